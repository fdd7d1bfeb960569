"""Sockets: every option, limit and address rule of the project is in this file.

A message is one MessagePack header frame (`roundtable.common.protocol.envelope.Envelope`) and any number of raw tensor frames.
Workers and servers connect with DEALER; servers and the coordinator listen with ROUTER. Between a worker and a server, tensors
have a connection of their own, so that small messages do not wait behind them. One socket belongs to one thread. Nothing here
blocks: a message that cannot be sent now is dropped, because the process that waits for an answer asks again.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zmq

from roundtable.common.network.addresses import needs_ipv6
from roundtable.common.protocol.envelope import Envelope
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.embedding import RowPull, Rows
from roundtable.common.protocol.messages.kv import KvPull
from roundtable.common.protocol.messages.sharded import ShardedForward, ShardedForwardReply
from roundtable.common.runtime.errors import UsageError, WireError

PROTOCOL = 3

#: Largest frame that is accepted, in bytes: a chunk, and room for a long layout in a header.
MAX_FRAME_BYTES = 16 << 20
#: Most frames of a message. A decoded message takes up many times its bytes.
MAX_FRAMES = 4096
#: Most bytes of a header.
MAX_HEADER_BYTES = 4 << 20
#: Most files that a process has open besides its connections.
_OTHER_FILES = 500
#: Further files for strangers' connections, if the system allows them.
_FILES_OF_STRANGERS = 4000
#: Connections that may wait to be accepted.
_BACKLOG = 1024
#: Closes a connection after about 60 seconds if its other end has vanished.
_KEEPALIVE = {zmq.TCP_KEEPALIVE: 1, zmq.TCP_KEEPALIVE_IDLE: 30, zmq.TCP_KEEPALIVE_INTVL: 10, zmq.TCP_KEEPALIVE_CNT: 3}
#: Seconds between two signs of life.
HEARTBEAT_S = 0.5
#: If two looks at the clock are so many seconds apart, this process was stopped meanwhile and has not listened.
STOPPED_S = 1.0
#: Seconds, besides those for a checkpoint, after which a process that was asked to stop leaves without the coordinator's consent.
GO_S = 5.0
#: Seconds after which an unanswered request without tensors is sent again.
ASK_AGAIN_S = 1.0
#: Seconds after which an unanswered request with tensors is sent again.
SEND_AGAIN_S = 5.0
#: Seconds per worker of the run that a worker waits before it asks for work: 2000 questions per second in all.
PATIENCE_BY_WORKER_S = 5e-4

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Envelope)
#: The C library, which draws the first of a ROUTER's own names for connections. libzmq does not seed it, and a peer that uses the
#: next name for itself makes libzmq abort this process.
_LIBC = ctypes.CDLL(None)

Frames = Sequence[Any]

_ADDRESS = re.compile(r"tcp://(\[[0-9A-Fa-f:.%]+\]|[^:/\[\]\s]+):[0-9]{1,5}", re.ASCII)
_WORKER = re.compile(r"worker-(0|[1-9][0-9]{0,15})", re.ASCII)


class ForeignRun(WireError):
    """A message belongs to `run`, which is not the run of this process."""

    def __init__(self, text: str, run: str) -> None:
        super().__init__(text, "run")
        self.run = run


@dataclass
class Stamp:
    """The fields that a process writes on its messages, and checks on those of others."""

    sender: str = ""
    run: str = ""
    epoch: int = 0
    incarnation: int = 0

    def encode(self, body: Body, ticket: int | None = None) -> bytes:
        """Return a header. Between servers and workers, `ticket` replaces the incarnation."""
        incarnation = self.incarnation if ticket is None else ticket
        return _ENCODER.encode(Envelope(PROTOCOL, self.run, self.sender, incarnation, self.epoch, body))  # type: ignore[arg-type]

    def open(self, header: Any, joining: bool = False) -> Envelope:
        """Return the envelope in a header frame. Raises WireError if it is malformed, of another run or of another version.

        `joining`: the sender may not know the run's id yet.
        """
        if len(header) > MAX_HEADER_BYTES:
            raise WireError(f"a header has {len(header)} bytes; {MAX_HEADER_BYTES} are allowed", "oversized")
        try:
            envelope = _DECODER.decode(header)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise WireError(f"a header could not be read: {error}", "malformed") from None
        sender = envelope.sender or "a peer"
        if envelope.protocol != PROTOCOL:
            raise WireError(f"{sender} speaks protocol {envelope.protocol}, not {PROTOCOL}", "protocol")
        if self.run and envelope.run != self.run and (envelope.run or not joining):
            raise ForeignRun(f"{sender} belongs to run {envelope.run or '(none)'}, not {self.run}", envelope.run)
        return envelope


def new_incarnation() -> int:
    """Return a random number that tells this process from an earlier one of the same name."""
    return int.from_bytes(os.urandom(6), "little")


def allow_files(count: int) -> None:
    """Let this process open `count` connections or other files, and some more. Raises UsageError if the system forbids it."""
    needed = count + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed + _FILES_OF_STRANGERS:
        return
    wanted = needed + _FILES_OF_STRANGERS
    if hard != resource.RLIM_INFINITY and wanted > hard:
        wanted = max(needed, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard if hard == resource.RLIM_INFINITY else max(hard, wanted)))
    except (OSError, ValueError):
        if soft >= needed:
            return
        raise UsageError(
            f"a process here needs {needed} open files for its connections, and the system allows {hard}: raise that limit "
            f"(ulimit -Hn {needed}), or use fewer workers."
        ) from None


def router(context: zmq.Context[Any], bind: str) -> tuple[zmq.Socket[bytes], str]:
    """Return a listening ROUTER and its real address. At tcp://*:PORT, it listens by IPv4 and IPv6.

    Raises UsageError if it cannot listen at `bind`.
    """
    _LIBC.srand(int.from_bytes(os.urandom(4), "little"))
    is_any = bind.startswith("tcp://*:")
    sock = _listening(context, bind, is_any or "[" in bind)
    try:
        try:
            sock.bind(bind)
        except zmq.ZMQError as error:
            if not is_any or error.errno == zmq.EADDRINUSE:
                raise
            sock.close()
            sock = _listening(context, bind, ipv6=False)  # this host has no IPv6
            sock.bind(bind)
    except zmq.ZMQError as error:
        sock.close()
        if error.errno == zmq.EADDRINUSE:
            raise UsageError(f"{bind} is in use by another program: choose another port, or 0 for any free one.") from None
        raise UsageError(f"cannot listen at {bind}: {error}.") from None
    return sock, sock.getsockopt_string(zmq.LAST_ENDPOINT)


def _listening(context: zmq.Context[Any], bind: str, ipv6: bool) -> zmq.Socket[bytes]:
    sock = _socket(context, zmq.ROUTER, ipv6)
    sock.setsockopt(zmq.ROUTER_MANDATORY, 1)  # otherwise messages without a route vanish silently
    return sock


def dealer(
    context: zmq.Context[Any], address: str, watch: Callable[[zmq.Socket[bytes]], object] | None = None
) -> zmq.Socket[bytes]:
    """Return a DEALER connected to `address`. `watch` gets the socket before it connects.

    Raises UsageError if `address` is not an address.
    """
    sock = _socket(context, zmq.DEALER, needs_ipv6(address))
    if watch is not None:
        watch(sock)
    try:
        sock.connect(address)
    except zmq.ZMQError as error:
        sock.close()
        raise UsageError(f"'{address}' is no address to connect to: {error}. It looks like tcp://HOST:PORT.") from None
    return sock


def _socket(context: zmq.Context[Any], kind: int, ipv6: bool) -> zmq.Socket[bytes]:
    sock: zmq.Socket[bytes] = context.socket(kind)
    sock.setsockopt(zmq.LINGER, 1000)
    sock.setsockopt(zmq.IMMEDIATE, 0)  # queue while connecting: the header of a message that is stale by then is refused
    sock.setsockopt(zmq.RECONNECT_IVL, 50)
    sock.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    sock.setsockopt(zmq.HANDSHAKE_IVL, 10000)
    sock.setsockopt(zmq.BACKLOG, _BACKLOG)
    for option, value in _KEEPALIVE.items():
        sock.setsockopt(option, value)
    sock.setsockopt(zmq.IPV6, int(ipv6))
    sock.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    sock.setsockopt(zmq.SNDHWM, 10000)
    sock.setsockopt(zmq.RCVHWM, 10000)
    return sock


def send(sock: zmq.Socket[bytes], header: bytes, frames: Frames = (), to: bytes | None = None, copy: bool = False) -> bool | None:
    """Send a message without blocking. Its frames are copied only if `copy`.

    Return False if the message cannot be sent now, and None if the connection `to` is gone. In both cases nothing was sent.
    """
    parts = [header, *frames] if to is None else [to, header, *frames]
    try:
        sock.send_multipart(parts, zmq.NOBLOCK, copy=copy)
    except zmq.ZMQError as error:
        if error.errno == zmq.EAGAIN:
            return False
        if error.errno == zmq.EHOSTUNREACH:
            return None
        raise
    return True


def receive(sock: zmq.Socket[bytes]) -> list[zmq.Frame] | None:
    """Return the next message's frames without copying, or None if there is none now.

    Raises WireError for a message with too many frames, which is dropped.
    """
    try:
        frames = [sock.recv(zmq.NOBLOCK, copy=False)]
    except zmq.Again:
        return None
    while frames[-1].more:
        if len(frames) == MAX_FRAMES:
            del frames[:]
            count = MAX_FRAMES + _skip_message(sock)
            raise WireError(f"a message has {count} frames; {MAX_FRAMES} are allowed", "oversized")
        frames.append(sock.recv(copy=False))
    return frames


def _skip_message(sock: zmq.Socket[bytes]) -> int:
    """Skip the remaining frames of a message, and return their number."""
    count = 0
    while sock.recv(copy=False).more:
        count += 1
    return count + 1


def is_bulk(body: Body, frames: Frames) -> bool:
    """Return whether a message goes by the connection for tensors.

    Messages with tensors do, except rows and logits, for which a forward waits. Pulls of keys do too, so that they never overtake
    pushes.
    """
    return isinstance(body, KvPull) or (
        bool(frames) and not isinstance(body, RowPull | Rows | ShardedForward | ShardedForwardReply)
    )


def is_worker(name: str) -> bool:
    """Return whether `name` is a worker's name."""
    return _WORKER.fullmatch(name) is not None


def is_address(text: str) -> bool:
    """Return whether `text` looks like an address to connect to."""
    return text.isprintable() and _ADDRESS.fullmatch(text) is not None


def bytes_of(frame: Any) -> memoryview:
    """Return the bytes of a frame, which may be ZeroMQ's or any buffer."""
    return frame.buffer if isinstance(frame, zmq.Frame) else memoryview(frame)


def write_address(path: Path, address: str) -> None:
    """Write `address` to the file `path`, as a whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(address + "\n", encoding="utf-8")
    temporary.rename(path)
