"""A TCP proxy that delays traffic. It passes connections that the kernel redirects here on to their original destination.

`python -m benchmarks.faults.proxy PORT SECONDS` delays each direction for so long. Linux only.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys

_SO_ORIGINAL_DST = 80
_READ_BYTES = 256 << 10
#: The most pieces of one direction that may be on their way.
_MOST = 1000


async def _delayed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    """Pass on each piece `seconds` after it came, until the stream ends."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_MOST)

    async def read() -> None:
        data = b"?"
        while data:
            data = b""
            with contextlib.suppress(OSError):
                data = await reader.read(_READ_BYTES)
            await queue.put((loop.time() + seconds, data))

    reading = asyncio.create_task(read())
    try:
        while True:
            at, data = await queue.get()
            await asyncio.sleep(max(0.0, at - loop.time()))
            if not data:
                break
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        reading.cancel()
        writer.close()


async def _serve(port: int, seconds: float) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        where = sock.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)
        to, host = struct.unpack("!2xH4s8x", where)
        try:
            onward = await asyncio.open_connection(socket.inet_ntoa(host), to)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_delayed(reader, onward[1], seconds), _delayed(onward[0], writer, seconds))

    server = await asyncio.start_server(connected, "0.0.0.0", port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), float(sys.argv[2])))
