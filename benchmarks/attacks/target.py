"""A listening process that is attacked, and ways to send it bytes and messages."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import zmq

from benchmarks.live import Cluster
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.gradients import Pull, Push
from roundtable.common.protocol.transport import PROTOCOL, Stamp

#: The first bytes of a ZeroMQ peer of the DEALER kind.
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31)
READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
#: The flags before a frame with a long length: of the last frame of a message, and of one that another frame follows.
LAST, MORE = b"\x02", b"\x03"
_TIMEOUT_S = 2.0
#: Seconds between an attack and the same attack once more.
AGAIN_S = 0.02
#: Seconds for which some attacks keep their connections open.
STAY_S = 0.5
#: The most seconds that an attack takes.
ENDS_S = 10.0
#: The name of a worker that does not exist. To servers it is a worker that they do not know yet.
NOBODY = "worker-9000000"
#: Rounds that may have begun since the newest one of the event log, and chunks of a small model on a server.
ROUNDS, CHUNKS = 40, 6
_MICRO_BATCH = 16
#: Bytes of its largest layers as float16 and as float64. No chunk of it has so many as float32.
HALF, DOUBLE = 1 << 15, 1 << 18


@dataclass(frozen=True)
class Target:
    """The address of a process, the id of its run, and the newest round in the event log."""

    host: str
    port: int
    run: str
    round: Callable[[], int]

    @property
    def address(self) -> str:
        return f"tcp://{self.host}:{self.port}"


def targets(run: Cluster) -> list[Target]:
    """Return the coordinator and all servers of a run."""
    newest = {event.process: event.data["address"] for event in run.events("joined") if event.data.get("address")}
    name = next(event.data["run"] for event in reversed(run.events("started")) if event.process == "coordinator")
    found = []
    for address in [(run.folder / "address").read_text().strip(), *newest.values()]:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        found.append(Target(host, int(port), name, run.rounds))
    return found


@contextlib.contextmanager
def open_plain(target: Target, *begin: bytes) -> Iterator[socket.socket]:
    """Open a TCP connection, and send this first."""
    with socket.create_connection((target.host, target.port), timeout=_TIMEOUT_S) as sock:
        sock.sendall(b"".join(begin))
        yield sock


@contextlib.contextmanager
def open_peer(target: Target, *begin: bytes) -> Iterator[socket.socket]:
    """Open a connection of a ZeroMQ peer, exchange greetings, and send this first."""
    with open_plain(target, GREETING) as sock:
        sock.recv(len(GREETING), socket.MSG_WAITALL)
        sock.sendall(READY)
        sock.recv(1 << 10)
        sock.sendall(b"".join(begin))
        yield sock


def say(address: str, messages: Sequence[Sequence[bytes]]) -> None:
    """Send messages, each a header and frames, as a ZeroMQ peer."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        sock = context.socket(zmq.DEALER)
        sock.connect(address)
        for message in messages:
            with contextlib.suppress(zmq.Again):
                sock.send_multipart(message, zmq.NOBLOCK)
    finally:
        context.destroy(linger=round(STAY_S * 1000))


def header_of(target: Target, body: Body, sender: str = NOBODY, run: str | None = None, protocol: int = PROTOCOL) -> bytes:
    """Return the header of a message that says it is of `sender`."""
    envelope = msgspec.msgpack.decode(Stamp(sender, target.run if run is None else run, 0, 7).encode(body))
    return msgspec.msgpack.encode([protocol, *envelope[1:]])


def push_of(round_: int, *chunks: int) -> Push:
    """Return a message with gradients of some chunks."""
    return Push(round_, 0, 1, _MICRO_BATCH, 1, list(chunks), [1] * len(chunks))


def of_unknown_rounds(target: Target) -> list[Body]:
    """Return messages about rounds and chunks that do not exist."""
    rounds, chunks = (10**6, 10**15), (10**3, 10**15)
    bodies: list[Body] = [push_of(round_, 0) for round_ in rounds]
    bodies += [push_of(target.round() + later, chunk) for later in range(ROUNDS) for chunk in chunks]
    return bodies + [Pull(round_, have_chunks=list(chunks)) for round_ in rounds]
