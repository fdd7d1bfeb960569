"""Attacks of strangers on listening processes, and of joined workers on a run, for the fault matrix and tests.

An item is done once to one process, or again and again to all processes of a run while `attacking`. All targets are processes on
this machine that a test has started. Every attack is bounded in count and time. docs/security.md has the table.
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
from roundtable.common.config.batch_plan import make_segment
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.commit import Committed, Metrics, Report
from roundtable.common.protocol.messages.gradients import Pull, Push
from roundtable.common.protocol.messages.kv import KvPush
from roundtable.common.protocol.messages.session import Goodbye, Heartbeat, Hello, MembersLost, Peer, Stop, Welcome
from roundtable.common.protocol.messages.setup import Plan
from roundtable.common.protocol.transport import (
    MAX_FRAME_BYTES,
    MAX_FRAMES,
    MAX_HEADER_BYTES,
    PROTOCOL,
    Frames,
    Stamp,
    allow_files,
    dealer,
    new_incarnation,
    receive,
    send,
)
from roundtable.common.runtime.errors import WireError

#: The first bytes of a ZeroMQ peer of the DEALER kind.
_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31)
_READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
#: The flags before a frame with a long length: of the last frame of a message, and of one that another frame follows.
_LAST, _MORE = b"\x02", b"\x03"
_TIMEOUT_S = 2.0
#: Seconds between two times that an item is done, and seconds for which connections of some items stay.
_AGAIN_S = 0.02
_STAY_S = 0.5
#: Seconds for an item to be done once, at most; and seconds between two looks at memory.
_ENDS_S, _LOOK_S = 10.0, 0.05
#: Simultaneous connections of a storm.
_STORM = 200
#: A worker that does not exist. Servers take it for one that they have not heard of yet.
_NOBODY = "worker-9000000"
#: Rounds that may have begun since the newest one of the event log, and chunks of a small model on a server.
_ROUNDS, _CHUNKS = 40, 6
_MICRO_BATCH = 16
#: Bytes of its largest layers as float16 and as float64. No chunk of it has so many as float32.
_HALF, _DOUBLE = 1 << 15, 1 << 18
#: The first names that libzmq gives to connections of a process's first and second listener, if the C library is not seeded; and
#: the number of names after these that are chosen.
_UNSEEDED = (0x6B8B4567, 0xE43C9869)
_NAMES = 40
#: Linux: a connection in repair sends nothing when it is closed.
_TCP_REPAIR = 19


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


@dataclass(frozen=True)
class Item:
    """An attack, and the kinds (`common/protocol/rejections.py`) under which refusals must be counted."""

    act: Callable[[Target], None]
    refused: Collection[str] = ()


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
def attacking(items: Sequence[Item], where: Sequence[Target]) -> Iterator[None]:
    """Do items again and again, each in a thread of its own for each target."""
    allow_files(4 * _STORM * len(where))
    over = threading.Event()

    def repeat(item: Item, target: Target) -> None:
        while not over.wait(_AGAIN_S):
            with contextlib.suppress(OSError):  # the target does not let us in, or has shut us out
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
    """Open a TCP connection, and send this first."""
    with socket.create_connection((target.host, target.port), timeout=_TIMEOUT_S) as sock:
        sock.sendall(b"".join(begin))
        yield sock


@contextlib.contextmanager
def _peer(target: Target, *begin: bytes) -> Iterator[socket.socket]:
    """Open a connection of a ZeroMQ peer, exchange greetings, and send this first."""
    with _plain(target, _GREETING) as sock:
        sock.recv(len(_GREETING), socket.MSG_WAITALL)
        sock.sendall(_READY)
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
        context.destroy(linger=round(_STAY_S * 1000))


def _header(target: Target, body: Body, sender: str = _NOBODY, run: str | None = None, protocol: int = PROTOCOL) -> bytes:
    envelope = msgspec.msgpack.decode(Stamp(sender, target.run if run is None else run, 0, 7).encode(body))
    return msgspec.msgpack.encode([protocol, *envelope[1:]])


def _push(round_: int, *chunks: int) -> Push:
    return Push(round_, 0, 1, _MICRO_BATCH, 1, list(chunks), [1] * len(chunks))


def _bodies() -> list[Body]:
    return [Goodbye("x"), Pull(1), _push(1, 0), Stop(True), MembersLost(9, ["worker-0"])]


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
    """Send a message in which every frame announces another one."""
    frame = _MORE + struct.pack(">Q", 1 << 20) + bytes(1 << 20)
    with _peer(target) as sock:
        for _ in range(200):
            sock.sendall(frame)


def _misshapen(target: Target) -> None:
    """Send gradients as a stranger that knows the run's id: too short, of two or eight bytes a number, too many or too few.

    A gradient that fits would count, because a stranger that knows the id may as well join."""
    begin, messages = target.round(), []
    for round_ in range(begin, begin + _ROUNDS):
        header = _header(target, _push(round_, random.randrange(_CHUNKS)))
        messages.append([header, *[[], [bytes(3)], [bytes(_HALF)], [bytes(_DOUBLE)], [bytes(4)] * 2][round_ % 5]])
    say(target.address, messages)


def _empty_frames(target: Target) -> None:
    """Send a message of three million frames without a byte, six megabytes in all."""
    with _peer(target) as sock:
        sock.sendall(b"\x01\x00" * 3_000_000 + b"\x00\x00")
        time.sleep(_STAY_S)


# ---- headers


def _colliding(target: Target) -> None:
    """Send maps whose keys are arrays of -1 and -2, which all have one hash: decoding one takes the square of its size."""
    pairs = b"".join(b"\x9a" + bytes(0xFF - (n >> bit & 1) for bit in range(10)) + b"\xc0" for n in range(1 << 10))
    bomb = msgspec.Raw(b"\xdf" + struct.pack(">I", 40 << 10) + pairs * 40)
    body = {
        "type": "Push",
        "round": 0,
        "lo": 0,
        "hi": 1,
        "samples": 1,
        "micro_batches": 1,
        "chunks": [],
        "present": [],
        "hypers": [bomb],
    }
    small = msgspec.Raw(b"\xdf" + struct.pack(">I", 3 << 10) + pairs * 3)
    hello = {"type": "Hello", "role": "worker", "arithmetic": small}
    said = [(run, sender, body) for run in (target.run, "") for sender in (_NOBODY, "worker-0", "server-0")]
    for run, sender, what in [*said, ("", "worker", hello)]:
        say(target.address, [[msgspec.msgpack.encode([PROTOCOL, run, sender, 7, 0, what])]])


def _made_up_names(target: Target) -> None:
    """Send thousands of names that workers may have one day."""
    pull = Pull(0)
    say(target.address, [[_header(target, pull, f"worker-{number}")] for number in range(3000)])


def _unknown_senders(target: Target) -> None:
    names = ("", "nobody", "worker-00", "worker-0", "worker-1", "server-0", "server-7", "coordinator", "\0" * 99)
    say(target.address, [[_header(target, body, sender)] for body in _bodies() for sender in names])


def _of_unknown_rounds(target: Target) -> list[Body]:
    rounds, chunks = (10**6, 10**15), (10**3, 10**15)
    bodies: list[Body] = [_push(round_, 0) for round_ in rounds]
    bodies += [_push(target.round() + later, chunk) for later in range(_ROUNDS) for chunk in chunks]
    return bodies + [Pull(round_, have_chunks=list(chunks)) for round_ in rounds]


def _unknown_rounds(target: Target) -> None:
    say(target.address, [[_header(target, body), bytes(4)] for body in _of_unknown_rounds(target)])


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


def _ready_as(name: bytes) -> bytes:
    """Return `_READY` of a peer that has chosen the name of its connection."""
    said = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity" + struct.pack(">I", len(name)) + name
    return b"\x04" + bytes([len(said)]) + said


def _chosen_names(target: Target) -> None:
    """Connect with the names that libzmq would give next if the C library were not seeded: libzmq would abort the process."""
    with contextlib.ExitStack() as stack:
        for first in _UNSEEDED:
            for number in range(first, first + _NAMES):
                sock = stack.enter_context(_plain(target, _GREETING))
                sock.recv(len(_GREETING), socket.MSG_WAITALL)
                sock.sendall(_ready_as(b"\0" + struct.pack(">I", number)))
        for _ in range(2 * _NAMES):
            stack.enter_context(_peer(target))


def _idle(target: Target) -> None:
    """Open connections that greet as ZeroMQ does, and say nothing else."""
    with contextlib.ExitStack() as stack:
        for _ in range(2 * _STORM):
            stack.enter_context(_peer(target))
        time.sleep(2 * _STAY_S)


def _web(target: Target) -> None:
    for method in ("GET", "POST", "OPTIONS"):
        with _plain(target, f"{method} / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n123456789".encode()):
            time.sleep(_STAY_S / 10)


def _scan(target: Target) -> None:
    """Open connections and close them at once, as port scanners do."""
    for abrupt in (False, True) * 25:
        with _plain(target) as sock:
            if abrupt:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _slow(target: Target) -> None:
    """Send a byte at a time, and ask without ever reading."""
    question = _header(target, Pull(0, full_precision=True))
    with _peer(target, (b"\x00" + bytes([len(question)]) + question) * 1000), _plain(target) as slow:
        for byte in (_GREETING + _READY)[:20]:
            slow.send(bytes([byte]))
            time.sleep(_STAY_S / 5)


def _half_open(target: Target) -> None:
    """Open connections that never finish their handshake."""
    with contextlib.ExitStack() as stack:
        for n in range(30):
            stack.enter_context(_plain(target, (b"", _GREETING[:10], _GREETING)[n % 3]))
        time.sleep(6 * _STAY_S)


def _vanishing(target: Target) -> None:
    """Open connections and vanish without a word, as by a power cut. Without root rights, close them."""
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
    """Open many connections at once. Half are ZeroMQ's."""
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
    "unknown rounds and chunks": Item(_unknown_rounds, ("sender",)),
    "another run's id": Item(_another_run, ("run",)),
    "another version of the protocol": Item(_another_protocol, ("protocol",)),
    "HTTP requests": Item(_web),
    "port scans": Item(_scan),
    "slow peers": Item(_slow, ("sender",)),
    "handshakes that are never finished": Item(_half_open),
    "peers that vanish without a word": Item(_vanishing),
    f"a storm of {_STORM} connections": Item(_storm, ("sender",)),
    "a message of three million frames": Item(_empty_frames, ("flood",)),
    "headers that take long to decode": Item(_colliding, ("malformed", "oversized", "sender")),
    "names that were made up": Item(_made_up_names, ("sender",)),
    "connections with the next one's name": Item(_chosen_names),
    f"{2 * _STORM} connections that say nothing": Item(_idle),
}


# ---- workers that have joined


class Joined:
    """A worker that has joined, as any process can that reaches the coordinator. It does only what it is told here."""

    def __init__(self, coordinator: Target) -> None:
        self.coordinator = coordinator
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._stamp = Stamp("worker", "", 0, new_incarnation())
        self._sockets = {"coordinator": dealer(self._context, coordinator.address)}
        self.welcome = self._join()

    def _join(self) -> Welcome:
        deadline = time.monotonic() + _ENDS_S
        while time.monotonic() < deadline:
            self.tell(Hello("worker", host="a stranger's"))
            self._sockets["coordinator"].poll(200)
            for body in self.heard("coordinator"):
                if isinstance(body, Welcome):
                    self._stamp.sender, self._stamp.run = body.process, body.run
                    for number, peer in enumerate(body.servers):
                        self._sockets[f"server-{number}"] = dealer(self._context, peer.address)
                    return body
        raise AssertionError("a worker more is not taken in")

    def heard(self, name: str) -> list[Body]:
        """Return the messages that a process has sent since the last call."""
        found: list[Body] = []
        with contextlib.suppress(WireError):
            while (frames := receive(self._sockets[name])) is not None:
                found.append(self._stamp.open(frames[0].buffer).read())
        return found

    def tell(self, body: Body, frames: Frames = (), to: str = "coordinator", sender: str = "", number: int | None = None) -> None:
        """Send a message, in the name of `sender` with that incarnation if given."""
        own = None if to == "coordinator" else self.welcome.ticket
        stamp = Stamp(sender, self._stamp.run, 0, number or 0) if sender else self._stamp
        send(self._sockets[to], stamp.encode(body, None if sender else own), frames, copy=True)

    @property
    def servers(self) -> list[str]:
        return [name for name in self._sockets if name != "coordinator"]

    def close(self) -> None:
        self.tell(Goodbye(early=True))
        self._context.destroy(linger=round(_STAY_S * 1000))


def _plans(joined: Joined) -> None:
    """Plan ten rounds more than all others do, after theirs."""
    settings = joined.welcome.settings
    for samples in (settings.global_batch, 10 * settings.global_batch):
        before = None
        for _ in range(2):
            before = make_segment(
                before=before, samples=samples, global_batch=settings.global_batch, micro_batch=settings.micro_batch,
                epochs=settings.epochs, round_limit=None,
            )  # fmt: skip
            plan = msgspec.structs.replace(before, first_round=joined.coordinator.round() if before.index else 0)
            for segment in (before, plan):
                joined.tell(Plan(segment))
                for server in joined.servers:
                    joined.tell(Plan(segment, joined.welcome.ticket), to=server)


def _fails(joined: Joined) -> None:
    """Say that it has failed, in letters that would clear a screen."""
    joined.tell(Goodbye("\x1b[2J\x1b]0;all is lost\x07 and so the run is over"))


def _model(joined: Joined) -> None:
    """Hand in another model, and its hash, after a goodbye."""
    joined.tell(Goodbye())
    part = {"type": "ModelPart", "round": joined.coordinator.round(), "part": 0, "parts": 1, "weights_sha256": "c0ffee" * 10}
    joined.tell(_Encoded(part), [b"another model" * 1000])  # type: ignore[arg-type]


def _reports(joined: Joined) -> None:
    """Report rounds in a server's name, with every number that a worker gets to know."""
    welcome = joined.welcome
    numbers = [welcome.ticket, *(peer.incarnation for peer in welcome.servers if isinstance(peer, Peer))]
    for number in (*numbers, 0, 1):
        for server in joined.servers:
            report = Report(1 << 50, 1 << 40, [Committed(joined.coordinator.round() + 1, 64, 4, 0, {"loss": 0.0})])
            joined.tell(report, sender=server, number=number)
            joined.tell(Heartbeat("waiting", 1 << 40), sender=server, number=number)
        for other in ("worker-0", "worker-1"):
            joined.tell(Goodbye("x"), sender=other, number=number)
            joined.tell(Push(0, 0, 1, 1, 1, [], []), to=joined.servers[0], sender=other, number=number)


def _metrics(joined: Joined) -> None:
    """Log as many metrics as fit, with long names."""
    for _ in range(4):
        values = {f"{os.urandom(8).hex()}{'x' * 900}": 0.0 for _ in range(900)}
        joined.tell(Metrics(random.randrange(1 << 50), joined.coordinator.round(), values))


def _beats(joined: Joined) -> None:
    """Send heartbeats that would have to be kept, or logged again and again."""
    beat = {"type": "Heartbeat", "state": "computing"}
    for field, value in (
        ("later", [[]] * 500_000),
        ("taken", [[0, 0]] * 200_000),
        ("left", [0] * 1_000_000),
        ("refused", {os.urandom(8).hex() * 30: 1 for _ in range(1000)}),
    ):
        joined.tell(_Encoded({**beat, field: value}))  # type: ignore[arg-type]


class _Encoded(dict[str, object]):
    """A body that is no message of this project."""


def _keys(joined: Joined) -> None:
    """Push values by key until the servers take no more, and keys without values."""
    for server in joined.servers:
        for _ in range(10):
            number, size = random.randrange(1 << 50), 4 << 20
            joined.tell(KvPush(number, f"key {number}", 0, size, "uint8", "set", number), [bytes(size)], to=server)
            joined.tell(KvPush(number + 1, f"key {number + 1:900}", 0, 0, "uint8", "set", number + 1), [b""], to=server)


def _unfit(joined: Joined) -> None:
    """Push gradients of other sizes and types than those of the model."""
    for round_ in range(joined.coordinator.round(), joined.coordinator.round() + _ROUNDS):
        frames = [[], [bytes(3)], [bytes(_HALF)], [bytes(_DOUBLE)], [bytes(4)] * 2][round_ % 5]
        for server in joined.servers:
            joined.tell(_push(round_, random.randrange(_CHUNKS)), frames, to=server)


def _nowhere(joined: Joined) -> None:
    """Push gradients of rounds and chunks that do not exist, and ask for such."""
    for body in _of_unknown_rounds(joined.coordinator):
        for server in joined.servers:
            joined.tell(body, [bytes(4)] if isinstance(body, Push) else (), to=server)


@dataclass(frozen=True)
class Deed:
    """An attack of a joined worker, once or again and again; kinds of refusals as in `Item`; flags of the run."""

    act: Callable[[Joined], None]
    refused: Collection[str] = ()
    flags: Sequence[object] = ()
    #: The worker leaves by this, so another one has to join.
    leaves: bool = False


DEEDS: Mapping[str, Deed] = {
    "a plan of more rounds": Deed(_plans, ("unfit",)),
    "a failure that it has not had": Deed(_fails, leaves=True),
    "another model in place of the trained one": Deed(_model, ("unfit",), leaves=True),
    "reports in a server's name": Deed(_reports, ("sender",)),
    "metrics without end": Deed(_metrics, ("flood",)),
    "words of itself without end": Deed(_beats, ("malformed",)),
    "values by key without end": Deed(_keys, ("unfit",), ("--kv-memory", 64)),
    "gradients of another size or type": Deed(_unfit, ("unfit",)),
    "unknown rounds and chunks": Deed(_nowhere, ("unfit",)),
}
#: Attacks that only keys can stop: any process that reaches the coordinator may join, and any on the wire can read.
NEED_KEYS: Mapping[str, str] = {
    "gradients of its own making, by a worker that has joined": "they count as anybody's",
    "to pull all weights, by a worker that has joined": "it is what workers do",
    "to take the place of a server that is lost, by a stranger": "it is given its shard where there are copies",
    "to be the coordinator that a worker asks, at an address that was mistyped": "the worker does what its settings say",
    "to read or change what is on the wire": "nothing on it is encrypted",
    "the names of many connections, held for hours by a member": "libzmq aborts where its own next name is among them",
}


@contextlib.contextmanager
def joining(deed: Deed, coordinator: Target) -> Iterator[None]:
    """Join as a worker, and do this again and again."""
    over = threading.Event()
    failures: list[BaseException] = []

    def repeat() -> None:
        joined = Joined(coordinator)
        try:
            while not over.wait(10 * _AGAIN_S):
                deed.act(joined)
                for name in ("coordinator", *joined.servers):
                    joined.heard(name)
                if deed.leaves:
                    joined.close()
                    joined = Joined(coordinator)
        except AssertionError as error:
            failures.append(error)
        finally:
            joined.close()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=2 * _ENDS_S)
    assert not failures, str(failures[0])


# ---- memory


class Memory:
    """Measures how much the processes of a run grow from now on."""

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
        """Stop measuring. Return the most bytes by which any of them has grown."""
        self._over.set()
        self._thread.join()
        return self._grown


def resident(pid: int) -> int:
    """Return the resident bytes of a process, or 0 if it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0
