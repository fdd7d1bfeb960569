"""Attacks of workers that have joined, for the fault matrix and tests.

docs/security.md has the table.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from benchmarks.attacks.joined import Joined
from benchmarks.attacks.target import AGAIN_S, CHUNKS, DOUBLE, ENDS_S, HALF, ROUNDS, Target, of_unknown_rounds, push_of
from roundtable.common.config.batch_plan import make_segment
from roundtable.common.protocol.messages.commit import Committed, Metrics, Report
from roundtable.common.protocol.messages.gradients import Push
from roundtable.common.protocol.messages.kv import KvPush
from roundtable.common.protocol.messages.session import Goodbye, Heartbeat, Peer
from roundtable.common.protocol.messages.setup import Plan


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


def _heartbeats(joined: Joined) -> None:
    """Send heartbeats that would have to be kept, or logged again and again."""
    heartbeat = {"type": "Heartbeat", "state": "computing"}
    for field, value in (
        ("later", [[]] * 500_000),
        ("taken", [[0, 0]] * 200_000),
        ("left", [0] * 1_000_000),
        ("refused", {os.urandom(8).hex() * 30: 1 for _ in range(1000)}),
    ):
        joined.tell(_Encoded({**heartbeat, field: value}))  # type: ignore[arg-type]


class _Encoded(dict[str, object]):
    """A body that is not a message of this project."""


def _keys(joined: Joined) -> None:
    """Push values by key until the servers take no more, and keys without values."""
    for server in joined.servers:
        for _ in range(10):
            number, size = random.randrange(1 << 50), 4 << 20
            joined.tell(KvPush(number, f"key {number}", 0, size, "uint8", "set", number), [bytes(size)], to=server)
            joined.tell(KvPush(number + 1, f"key {number + 1:900}", 0, 0, "uint8", "set", number + 1), [b""], to=server)


def _unfit(joined: Joined) -> None:
    """Push gradients of other sizes and types than those of the model."""
    for round_ in range(joined.coordinator.round(), joined.coordinator.round() + ROUNDS):
        frames = [[], [bytes(3)], [bytes(HALF)], [bytes(DOUBLE)], [bytes(4)] * 2][round_ % 5]
        for server in joined.servers:
            joined.tell(push_of(round_, random.randrange(CHUNKS)), frames, to=server)


def _nowhere(joined: Joined) -> None:
    """Push gradients of rounds and chunks that do not exist, and ask for such."""
    for body in of_unknown_rounds(joined.coordinator):
        for server in joined.servers:
            joined.tell(body, [bytes(4)] if isinstance(body, Push) else (), to=server)


@dataclass(frozen=True)
class Deed:
    """An attack of a joined worker, the kinds of its refusals as in `Item`, and flags of the run."""

    act: Callable[[Joined], None]
    refused: Collection[str] = ()
    flags: Sequence[object] = ()
    #: The worker leaves by this attack, so another one has to join.
    leaves: bool = False


DEEDS: Mapping[str, Deed] = {
    "a plan of more rounds": Deed(_plans, ("unfit",)),
    "a failure that it has not had": Deed(_fails, leaves=True),
    "another model in place of the trained one": Deed(_model, ("unfit",), leaves=True),
    "reports in a server's name": Deed(_reports, ("sender",)),
    "metrics without end": Deed(_metrics, ("flood",)),
    "words of itself without end": Deed(_heartbeats, ("malformed",)),
    "values by key without end": Deed(_keys, ("unfit",), ("--kv-memory", 64)),
    "gradients of another size or type": Deed(_unfit, ("unfit",)),
    "unknown rounds and chunks": Deed(_nowhere, ("unfit",)),
}
#: Attacks that only keys can stop: any process that reaches the coordinator may join, and any host on the way can read.
NEED_KEYS: Mapping[str, str] = {
    "gradients of its own making, by a worker that has joined": "they count like any worker's",
    "to pull all weights, by a worker that has joined": "all workers do so",
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
            while not over.wait(10 * AGAIN_S):
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
        thread.join(timeout=2 * ENDS_S)
    assert not failures, str(failures[0])
