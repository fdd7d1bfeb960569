"""One server that applies each push at once: what it enters in the ledger is what it has done, and buffers advance."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from hypothesis import given
from hypothesis import strategies as st
from simulation import schedules

from roundtable.common.config.batch_plan import make_segment
from roundtable.common.config.settings import Settings
from roundtable.common.model.tensor_bytes import from_frame, to_frame
from roundtable.common.protocol.messages.commit import Contribution, Report
from roundtable.common.protocol.messages.gradients import Ack, Pull, Push, Weights
from roundtable.common.protocol.messages.setup import InitialWeights, Plan, Setup, Update
from roundtable.common.protocol.model_spec import TensorSpec
from roundtable.ps.server.restoring import make_host

MICRO, COUNT, ROUNDS = 2, 3, 6  # samples of a micro-batch, micro-batches of a round, rounds
LAMBDA = 0.7
TENSORS = [
    TensorSpec("w", [5], "float64", 0),
    TensorSpec("bn.running_mean", [3], "float32", -1, "mean"),
    TensorSpec("bn.num_batches_tracked", [], "int64", -1, "max"),
]
FIRST = torch.linspace(-1, 1, 5, dtype=torch.float64), torch.full((3,), 2.0), torch.tensor([10])


def rate(round_: int) -> float:
    return 0.5 / (1 + round_)


class Server:
    def __init__(self, **settings: Any) -> None:
        chosen = Settings(policy="async", workers=4, servers=1, global_batch=MICRO * COUNT, micro_batch=MICRO, **settings)
        self.host = make_host(0, chosen)
        self.plan = make_segment(
            before=None, samples=MICRO * COUNT * ROUNDS, global_batch=MICRO * COUNT, micro_batch=MICRO, epochs=1, round_limit=None
        )
        self.say("worker-0", Setup(TENSORS, Update("SGD", [{"lr": 1.0}])))
        self.say("worker-0", Plan(self.plan))
        self.say("worker-0", InitialWeights([0, 1, 2]), [to_frame(tensor) for tensor in FIRST])

    def say(self, sender: str, body: Any, frames: Any = ()) -> list[Any]:
        return self.host.handle(sender, body, frames, 0.0)

    def pull(self, sender: str, clock: int, number: int) -> tuple[int, list[torch.Tensor]]:
        """The version, and the tensors."""
        found: dict[int, torch.Tensor] = {}
        version = -1
        for effect in self.say(sender, Pull(clock, number)):
            assert isinstance(effect.body, Weights)
            version = effect.body.version
            for chunk, frame in zip(effect.body.chunks, effect.frames, strict=True):
                spec = TENSORS[chunk]
                found[chunk] = from_frame(bytes(frame), spec.dtype, spec.numel, "weights").clone()
        return version, [found[chunk] for chunk in range(len(TENSORS))]

    def master(self, chunk: int) -> torch.Tensor:
        assert self.host.shard is not None
        return self.host.shard.model.dense.master(chunk)

    def restored(self) -> list[Contribution]:
        report = next(effect.body for effect in self.host.tick(1e6) if isinstance(effect.body, Report))
        return report.contributions


@dataclass
class Worker:
    """A worker that computes a micro-batch from the weights that it has got, and sends the result in parts."""

    name: str
    pulls: int = 0
    base: int = 0
    weights: list[torch.Tensor] = field(default_factory=list)
    unsent: list[tuple[Push, list[Any]]] = field(default_factory=list)

    def compute(self, server: Server, round_: int, k: int) -> torch.Tensor:
        self.pulls += 1
        self.base, self.weights = server.pull(self.name, 0, self.pulls)
        gradient = gradient_of(round_, k, self.weights[0])
        change = 0.1 * (torch.full((3,), float(k)) - self.weights[1])
        values = [gradient * MICRO, change * MICRO, torch.ones(1, dtype=torch.int64)]
        push = Push(round_, k, k + 1, MICRO, 1, [], [], base_version=self.base, hypers=[{"lr": rate(round_)}])
        parts = {
            chunk: (msgspec.structs.replace(push, chunks=[chunk], present=[1]), [to_frame(value)])
            for chunk, value in enumerate(values)
        }
        metrics: tuple[Push, list[Any]] = (msgspec.structs.replace(push, metrics={"loss": (2.0, 2.0)}), [])
        self.unsent = [parts[0], parts[2], metrics, parts[1]]
        return gradient


def gradient_of(round_: int, k: int, weights: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * round_ + k)
    return torch.randn(5, generator=generator, dtype=torch.float64) + weights


def test_a_micro_batch_that_comes_in_parts_is_in_the_ledger_when_it_began_to_count() -> None:
    server, one, two = Server(), Worker("worker-0"), Worker("worker-1")
    one.compute(server, 0, 0)
    two.compute(server, 0, 1)
    first, *rest = one.unsent
    for push, frames in [first, *two.unsent, *rest]:  # the metrics of the first come after all of the second
        server.say(one.name if push.lo == 0 else two.name, push, frames)
    rows = server.restored()
    assert [(row.lo, row.worker, row.outcome, row.staleness) for row in rows] == [
        (0, "worker-0", "committed", 0),
        (1, "worker-1", "committed", 1),
    ]


def test_one_that_another_worker_ends_is_whose_part_came_first_and_a_duplicate_of_the_others() -> None:
    server, one, two = Server(), Worker("worker-0"), Worker("worker-1")
    one.compute(server, 0, 0)
    server.say("worker-0", *one.unsent[0])
    two.compute(server, 0, 0)
    for part in two.unsent:
        server.say("worker-1", *part)
    rows = server.restored()
    assert [(row.lo, row.worker, row.outcome) for row in rows] == [(0, "worker-0", "committed"), (0, "worker-1", "duplicate")]
    assert server.host.missing() == [1, 2]


@schedules(40)
@given(st.integers(1, 4), st.sampled_from([0.0, LAMBDA]), st.integers(0, 1 << 40))
# I1, I7
def test_the_ledger_replayed_give_the_weights_whatever_comes_in_parts_twice_or_late(
    workers: int, compensation: float, seed: int
) -> None:
    chance, server = random.Random(seed), Server(delay_compensation=compensation)
    left = list(itertools.product(range(ROUNDS), range(COUNT)))
    supervisor = [Worker(f"worker-{number}") for number in range(workers)]
    computed: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    sent: list[tuple[str, Push, list[Any]]] = []
    while left or any(worker.unsent for worker in supervisor):
        worker = chance.choice(supervisor)
        if not worker.unsent:
            if not left:
                continue
            task = left.pop(0)
            computed[task] = worker.compute(server, *task), worker.weights[0]
        elif sent and chance.random() < 0.2:
            name, push, frames = chance.choice(sent[-6:])
            assert isinstance(server.say(name, push, frames)[0].body, Ack)
        else:
            sent.append((worker.name, *worker.unsent.pop(0)))
            server.say(*sent[-1])

    rows = [row for row in server.restored() if row.outcome == "committed"]
    assert sorted((row.round, row.lo) for row in rows) == sorted(computed)
    weights = [FIRST[0].clone()]
    for number, row in enumerate(rows):
        gradient, then = computed[row.round, row.lo]
        assert row.staleness is not None and torch.allclose(weights[number - row.staleness], then, atol=1e-12)
        compensated = gradient + compensation * gradient * gradient * (weights[-1] - then)
        weights.append(weights[-1] - rate_for(server, rows[: number + 1]) / COUNT * compensated)
    torch.testing.assert_close(server.master(0), weights[-1], rtol=0, atol=1e-12)


def rate_for(server: Server, rows: list[Contribution]) -> float:
    """The rate of the last of these: that which is planned for so many micro-batches, of those that had been told."""
    told, planned = {row.round for row in rows}, server.plan.round_of(len(rows) - 1)
    return rate(max((round_ for round_ in told if round_ <= planned), default=min(told)))


def test_buffers_advance_by_what_each_micro_batch_has_changed() -> None:
    server = Server()
    supervisor = [Worker(f"worker-{number}") for number in range(COUNT)]
    for k, worker in enumerate(supervisor):  # all from the same weights
        worker.compute(server, 0, k)
    for worker in supervisor:
        for part in worker.unsent * 2:
            server.say(worker.name, *part)
    assert server.master(2).tolist() == [10 + COUNT]
    expected = 2.0 + sum(0.1 * (k - 2.0) for k in range(COUNT))
    torch.testing.assert_close(server.master(1), torch.full((3,), expected))
