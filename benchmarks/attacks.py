"""What strangers can do to a process that listens: items of bad input on the wire, one by one, for the fault matrix and tests.

An item is done once to one process, and again and again while `attacking`, to all processes of a run at once.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import psutil  # type: ignore[import-untyped,unused-ignore]
import zmq

from benchmarks.live import Cluster
from common.messages import Body, Goodbye, Lost, Pull, Push, Stop
from common.wire import MAX_FRAME_BYTES, MAX_FRAMES, MAX_HEADER_BYTES, PROTOCOL, Stamp, allow_files

#: How a ZeroMQ peer of the DEALER kind begins.
_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31)
_READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
#: Before a frame with a long length: the last one of its message, and one after which there is another.
_LAST, _MORE = b"\x02", b"\x03"
_TIMEOUT_S = 2.0
#: Seconds between two times that an item is done, and for which connections of some items stay.
_AGAIN_S = 0.02
_STAY_S = 0.5
#: Seconds for an item to be done once, at most; and between two looks at memory.
_ENDS_S, _LOOK_S = 10.0, 0.05
#: Connections that a storm has at once.
_STORM = 200
#: A worker that there is not. To servers it is one that they have not heard of yet.
_NOBODY = "worker-9000000"
#: Rounds that may have begun since the newest one of the event log, and chunks that a small model has on a server.
_ROUNDS, _CHUNKS = 40, 6
_MICRO_BATCH = 16
#: Bytes that its largest layers would have as float16 and as float64; no chunk of it has so many as float32.
_HALF, _DOUBLE = 1 << 15, 1 << 18
#: Linux: what a connection in repair sends as it is closed is nothing.
_TCP_REPAIR = 19


@dataclass(frozen=True)
class Target:
    """Where a process listens; the id of its run, and the newest round that the event log has."""

    host: str
    port: int
    run: str
    round: Callable[[], int]

    @property
    def address(self) -> str:
        return f"tcp://{self.host}:{self.port}"


@dataclass(frozen=True)
class Item:
    """What is done, and the kinds (`common/refusals.py`) under which some of it is to be counted as refused."""

    act: Callable[[Target], None]
    refused: Collection[str] = ()


def targets(run: Cluster) -> list[Target]:
    """The coordinator and all servers of a run."""
    newest = {event.process: event.data["address"] for event in run.events("joined") if event.data.get("address")}
    name = next(event.data["run"] for event in reversed(run.events("started")) if event.process == "coordinator")
    found = []
    for address in [(run.folder / "address").read_text().strip(), *newest.values()]:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        found.append(Target(host, int(port), name, run.rounds))
    return found


@contextlib.contextmanager
def attacking(items: Sequence[Item], where: Sequence[Target]) -> Iterator[None]:
    """Items are done again and again, each by a thread of its own for each target."""
    allow_files(4 * _STORM * len(where))
    over = threading.Event()

    def repeat(item: Item, target: Target) -> None:
        while not over.wait(_AGAIN_S):
            with contextlib.suppress(OSError):  # it does not let us in, or has shut us out
                item.act(target)

    pairs = [(item, target) for item in items for target in where]
    threads = [threading.Thread(target=repeat, args=pair, daemon=True) for pair in pairs]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(timeout=_ENDS_S)


@contextlib.contextmanager
def _plain(target: Target, *begin: bytes) -> Iterator[socket.socket]:
    """A TCP connection, by which this is sent first."""
    with socket.create_connection((target.host, target.port), timeout=_TIMEOUT_S) as sock:
        sock.sendall(b"".join(begin))
        yield sock


@contextlib.contextmanager
def _peer(target: Target, *begin: bytes) -> Iterator[socket.socket]:
    """A connection of a ZeroMQ peer, both of which have said hello, by which this is sent first."""
    with _plain(target, _GREETING) as sock:
        sock.recv(len(_GREETING), socket.MSG_WAITALL)
        sock.sendall(_READY)
        sock.recv(1 << 10)
        sock.sendall(b"".join(begin))
        yield sock


def say(address: str, messages: Sequence[Sequence[bytes]]) -> None:
    """Send messages, which are header and frames, as a ZeroMQ peer."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        sock = context.socket(zmq.DEALER)
        sock.connect(address)
        for message in messages:
            with contextlib.suppress(zmq.Again):
                sock.send_multipart(message, zmq.NOBLOCK)
    finally:
        context.destroy(linger=round(_STAY_S * 1000))


def _header(target: Target, body: Body, sender: str = _NOBODY, run: str | None = None, protocol: int = PROTOCOL) -> bytes:
    envelope = msgspec.msgpack.decode(Stamp(sender, target.run if run is None else run, 0, 7).encode(body))
    return msgspec.msgpack.encode([protocol, *envelope[1:]])


def _push(round_: int, *chunks: int) -> Push:
    return Push(round_, 0, 1, _MICRO_BATCH, 1, list(chunks), [1] * len(chunks))


def _bodies() -> list[Body]:
    return [Goodbye("x"), Pull(1), _push(1, 0), Stop(True), Lost(9, ["worker-0"])]


# ---- frames


def _truncated(target: Target) -> None:
    header = _header(target, _push(target.round(), 0))
    say(target.address, [[header[: len(header) * part // 10]] for part in range(10)])
    with _peer(target, _LAST + struct.pack(">Q", 1000), header):
        pass


def _garbage(target: Target) -> None:
    sizes = [0, 1, 9, 300, 10_000]
    say(target.address, [[b"\x91" * 100_000], *([os.urandom(size), os.urandom(size)] for size in sizes)])
    for begin in (b"", _GREETING, _GREETING + _READY):
        with _plain(target, begin, os.urandom(random.choice(sizes))):
            pass
    with _peer(target, os.urandom(random.choice(sizes))):
        pass


def _oversized(target: Target) -> None:
    say(target.address, [[bytes(MAX_HEADER_BYTES + 1)], [b"x"] * (MAX_FRAMES + 1)])
    for size in (MAX_FRAME_BYTES + 1, (1 << 64) - 1):
        with _peer(target, _LAST + struct.pack(">Q", size), bytes(1 << 16)):
            time.sleep(_STAY_S / 10)


def _endless(target: Target) -> None:
    """A message whose frames always say that there is another."""
    frame = _MORE + struct.pack(">Q", 1 << 20) + bytes(1 << 20)
    with _peer(target) as sock:
        for _ in range(200):
            sock.sendall(frame)


def _misshapen(target: Target) -> None:
    """Gradients of a stranger that knows the run's id: too short, of two or eight bytes a number, too many or too few. One that
    fits would count, for who knows that id may as well join."""
    begin, messages = target.round(), []
    for round_ in range(begin, begin + _ROUNDS):
        header = _header(target, _push(round_, random.randrange(_CHUNKS)))
        messages.append([header, *[[], [bytes(3)], [bytes(_HALF)], [bytes(_DOUBLE)], [bytes(4)] * 2][round_ % 5]])
    say(target.address, messages)


# ---- headers


def _unknown_senders(target: Target) -> None:
    names = ("", "nobody", "worker-00", "worker-0", "worker-1", "server-0", "server-7", "coordinator", "\0" * 99)
    say(target.address, [[_header(target, body, sender)] for body in _bodies() for sender in names])


def _unknown_rounds(target: Target) -> None:
    rounds, chunks = (10**6, 10**15), (10**3, 10**15)
    bodies: list[Body] = [_push(round_, 0) for round_ in rounds]
    bodies += [_push(target.round() + later, chunk) for later in range(_ROUNDS) for chunk in chunks]
    bodies += [Pull(round_, have=list(chunks)) for round_ in rounds]
    say(target.address, [[_header(target, body), bytes(4)] for body in bodies])


def _another_run(target: Target) -> None:
    say(
        target.address,
        [[_header(target, body, sender, run)] for body in _bodies() for sender in ("worker-0", _NOBODY) for run in ("", "x")],
    )


def _another_protocol(target: Target) -> None:
    say(
        target.address, [[_header(target, body, protocol=p)] for body in _bodies() for p in (PROTOCOL - 1, PROTOCOL + 1, 1 << 60)]
    )


# ---- connections


def _web(target: Target) -> None:
    for method in ("GET", "POST", "OPTIONS"):
        with _plain(target, f"{method} / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n123456789".encode()):
            time.sleep(_STAY_S / 10)


def _scan(target: Target) -> None:
    """As port scanners do: connections that are closed at once, with or without ado."""
    for abrupt in (False, True) * 25:
        with _plain(target) as sock:
            if abrupt:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _slow(target: Target) -> None:
    """Who sends a byte at a time, and who asks and never reads."""
    question = _header(target, Pull(0, masters=True))
    with _peer(target, (b"\x00" + bytes([len(question)]) + question) * 1000), _plain(target) as slow:
        for byte in (_GREETING + _READY)[:20]:
            slow.send(bytes([byte]))
            time.sleep(_STAY_S / 5)


def _half_open(target: Target) -> None:
    """Connections that never say who they are, or go no further than that."""
    with contextlib.ExitStack() as stack:
        for n in range(30):
            stack.enter_context(_plain(target, (b"", _GREETING[:10], _GREETING)[n % 3]))
        time.sleep(6 * _STAY_S)


def _vanishing(target: Target) -> None:
    """Peers that are gone without a word, as by a power cut. For root only; else they close their connections."""
    for peer in (
        _plain(target),
        _plain(target, _GREETING),
        _peer(target),
        _peer(target, _LAST + struct.pack(">Q", 1000) + bytes(9)),
    ):
        with peer as sock, contextlib.suppress(PermissionError):
            time.sleep(_STAY_S / 10)
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)


def _storm(target: Target) -> None:
    """Many connections at once, of which half are ZeroMQ's."""
    with contextlib.ExitStack() as stack:
        for _ in range(_STORM // 2):
            stack.enter_context(_plain(target))
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            header = _header(target, Pull(0), "nobody")
            for _ in range(_STORM // 2):
                sock = context.socket(zmq.DEALER)
                sock.connect(target.address)
                sock.send(header)
            time.sleep(_STAY_S)
        finally:
            context.destroy(linger=0)


ITEMS: Mapping[str, Item] = {
    "truncated frames": Item(_truncated, ("malformed",)),
    "garbage": Item(_garbage, ("malformed",)),
    "oversized frames": Item(_oversized, ("oversized",)),
    "endless frames": Item(_endless, ("flood",)),
    "gradients of another size or type": Item(_misshapen, ("sender",)),
    "unknown senders": Item(_unknown_senders, ("sender",)),
    "unknown rounds and chunks": Item(_unknown_rounds, ("sender", "unfit")),
    "another run's id": Item(_another_run, ("run",)),
    "another version of the protocol": Item(_another_protocol, ("protocol",)),
    "HTTP requests": Item(_web),
    "port scans": Item(_scan),
    "slow peers": Item(_slow, ("sender",)),
    "handshakes that are never finished": Item(_half_open),
    "peers that vanish without a word": Item(_vanishing),
    f"a storm of {_STORM} connections": Item(_storm, ("sender",)),
}


# ---- memory


class Memory:
    """How much the processes of a run grow from now on."""

    def __init__(self, run: Cluster) -> None:
        self._over = threading.Event()
        self._grown = 0
        self._before = {pid: resident(pid) for pid in run.pids().values()}
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(_LOOK_S):
            for pid, size in self._before.items():
                self._grown = max(self._grown, resident(pid) - size)

    def grown(self) -> int:
        """The most bytes that any of them has come to have more. Nobody looks any more."""
        self._over.set()
        self._thread.join()
        return self._grown


def resident(pid: int) -> int:
    """Bytes of memory that a process has; 0 where there is none."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0
