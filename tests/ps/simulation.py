"""A simulated cluster in one process: its network loses, repeats, delays and reorders messages, and its clock is a number.

Coordinator, servers, workers and the workers' links are the real ones. Their sockets only look like ZeroMQ's. A worker's script
is like a user's. It runs on a thread of its own, and blocks wherever the worker's loop blocks, inside torch too. Only one thread
runs at any time: a script runs while the world waits for it, and the world runs while all scripts wait. So a run depends on its
seed alone.

The model's weights show mistakes of the cluster. Element n of `account` gets a gradient of 1 from micro-batch n of the run only,
so it shows how often that micro-batch was counted. The other gradients depend on the weights and round differently in every order
of summing. So they show a wrong order, or weights of a wrong round.

A codec for pushes compresses `account` and `c`. With `Case.rows` the model has an embedding table as well: that many rows, which
are looked up at random, and after them an account. With `Case.classes` it has a sharded layer with that many classes.
"""

from __future__ import annotations

import heapq
import itertools
import operator
import os
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, ClassVar, Literal
from unittest import mock

import msgspec
import torch
import zmq
from fake_sharded_link import rows_of, sharded
from hypothesis import HealthCheck, Phase, settings
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

from roundtable.common.codecs.chunks import coded_pieces
from roundtable.common.config.batch_plan import Segment, Task, make_segment
from roundtable.common.config.settings import Settings
from roundtable.common.model.reduction_tree import fold
from roundtable.common.model.row_pages import BLOCK
from roundtable.common.model.sparse_rows import owner_of
from roundtable.common.network.host_identity import Place, here
from roundtable.common.policies import load
from roundtable.common.protocol.effects import COORDINATOR, Send, number_of
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.gradients import Weights
from roundtable.common.protocol.messages.replication import RoundReplicatedAck, StateHeader, StatePart, StatePartAck
from roundtable.common.protocol.messages.session import Goodbye, Hello, Stop
from roundtable.common.protocol.messages.setup import (
    OfferSharedMemory,
    SharedMemoryReply,
    Update,
)
from roundtable.common.protocol.messages.sharded import LayerPush
from roundtable.common.protocol.shared_memory import Region
from roundtable.common.runtime.errors import RunStopped, Stopped, WireError
from roundtable.common.storage.event_log import FILE_NAME, RunLog, RunLogReader
from roundtable.common.storage.run_files import MODEL_FILE
from roundtable.ps.coordinator.coordinator import Coordinator
from roundtable.ps.coordinator.ending.farewell import RestartRun
from roundtable.ps.coordinator.main import run_to_recover, run_to_resume
from roundtable.ps.coordinator.recovery import RestoredRun
from roundtable.ps.server.server import _Server
from roundtable.ps.server.shard_host import ShardHost
from roundtable.ps.shard.shard import Shard
from roundtable.worker.client.io_thread import IoThread
from roundtable.worker.layers.sharded_linear import ShardedLinear, sharded_cross_entropy
from roundtable.worker.loop.contributor import Contributor
from roundtable.worker.loop.gradient_loop import GradientLoop
from roundtable.worker.optim.optimizer import example_optimizer, plain_settings
from roundtable.worker.replica.buffers import BufferRule
from roundtable.worker.run import Run
from roundtable.worker.session.session import Session

_TICK_S = 0.1
_COORDINATOR = "tcp://coordinator:1"
#: A run that takes longer than this, in simulated seconds, hangs.
_LIMIT_S = 5000.0


def schedules(examples: int) -> settings:
    """Return Hypothesis' settings for tests over random schedules.

    If the environment variable SCHEDULES is set, that many times `examples` schedules are tried, which differ each time.
    Otherwise half of `examples` are tried, which are always the same (decision 0010).
    """
    return settings(
        max_examples=examples * int(os.environ["SCHEDULES"]) if "SCHEDULES" in os.environ else (examples + 1) // 2,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=set(Phase) - {Phase.shrink},
    )


@dataclass(frozen=True)
class Network:
    """The network's faults."""

    #: The probability that a message is lost.
    loss: float = 0.0
    #: The probability that a message is sent twice.
    twice: float = 0.0
    #: The longest time that a message is under way, in seconds.
    delay_s: float = 0.01


@dataclass(frozen=True)
class Pace:
    """One worker's speed and faults. Times are seconds after its welcome, unless the comment says otherwise."""

    #: How long a micro-batch takes.
    compute_s: float = 0.1
    #: How long the script is busy with something else between two micro-batches.
    pause_s: float = 0.0
    #: When the worker starts, in seconds of the run.
    starts_s: float = 0.0
    #: When the worker dies. It is silent from then on.
    dies_s: float = float("inf")
    #: When the worker begins to compute for ever. It still sends heartbeats.
    hangs_s: float = float("inf")
    #: Begin and end, in seconds of the run, of a time when weights of the first chunk do not reach the worker.
    deaf_s: tuple[float, float] = (0.0, 0.0)
    #: Begin and end of a time when no message passes between the worker and the coordinator.
    cut_off_s: tuple[float, float] = (0.0, 0.0)
    #: When the worker is told to leave early.
    leaves_s: float = float("inf")
    #: When the script leaves its loop by itself, without a word to others.
    breaks_s: float = float("inf")
    #: When the script fails.
    fails_s: float = float("inf")
    #: True if the script fails because a server does not answer.
    finds_no_server: bool = False
    #: When the script asks for the run's end, and from which `run.round` on.
    ends_s: float = float("inf")
    ends_round: float = float("inf")
    #: True if the script does so before a batch's `step`, not only after it.
    ends_before_step: bool = False
    #: True if the script then leaves its loop by itself.
    then_breaks: bool = False
    #: The longest time that the script's function for the end of a round takes. -1: there is none.
    on_round_s: float = -1.0
    #: The `run.round` at which that function asks for the run's end.
    hook_ends_round: float = float("inf")
    #: How long after a worker's death another one without faults takes its place.
    restart_s: float = float("inf")


@dataclass(frozen=True)
class Case:
    """Everything that a run depends on."""

    settings: Settings
    paces: Sequence[Pace]
    #: (samples, epochs) of each call of `batches`.
    segments: Sequence[tuple[int, int]] = ((24, 2),)
    network: Network = Network()
    seed: int = 0
    clip_norm: float | None = None
    chunk_bytes: int = 48
    #: Chunks of weights that may be under way to a worker.
    credit: int = 1
    #: Weight buffers of each server.
    weight_buffers: int = 4
    momentum: float = 0.9
    lr: float = 0.125
    #: Rows of the embedding table that are looked up at random. 0: no table.
    rows: int = 0
    #: Classes of the sharded layer. 0: no sharded layer.
    classes: int = 0
    #: How workers share memory with servers. "": not at all. "beside": each worker with one server only. "apart": with all
    #: servers, and a worker leaves contributions to a round in separate gradient buffers.
    memory: Literal["", "shared", "beside", "apart"] = ""
    #: The folder for checkpoints, or None for a run without checkpoints.
    folder: Path | None = None
    #: True if the run goes on from the newest checkpoint in `folder`.
    resume: bool = False
    #: (place, when, after how many seconds another process is there) of killed processes. A place is coordinator, server-N or
    #: worker-N.
    killed: Sequence[tuple[str, float, float]] = ()
    #: (when, after how many seconds the run is started again) of SIGTERMs to the coordinator.
    stopped: Sequence[tuple[float, float]] = ()
    #: (place, when, after how many seconds another process is there) of SIGTERMs to servers and workers.
    told: Sequence[tuple[str, float, float]] = ()
    #: True if workers are on the coordinator's host, so that silent ones soon count as lost.
    near: bool = False
    #: Scripts agree on a value and evaluate after each loop over batches.
    decides: bool = False
    #: In a run with replicas: (server, when, after how many seconds another process is there) of servers that are killed once
    #: every shard has a copy.
    replaced: Sequence[tuple[int, float, float]] = ()
    #: The seed of the weights that the script gives to micro-batches; -1: it gives none.
    weights: int = -1

    def given(self, task: Task) -> float | None:
        """The weight that the script gives to a micro-batch. In some rounds all of them are 0."""
        if self.weights < 0:
            return None
        chance = random.Random(f"{self.weights} {task.round}")
        is_nothing = chance.random() < 0.2
        drawn = random.Random(f"{self.weights} {task.round} {task.k}").choice([0.0, 0.0, None, 1.0, 2.0, 0.25, 0.3, 7.0, 64.0])
        return 0.0 if is_nothing else drawn

    def weight(self, task: Task) -> float:
        """The weight that a micro-batch has."""
        given = self.given(task)
        return self.round(task.round).samples_in(task.k, task.k + 1) if given is None else given

    def weight_of(self, round_: int, ks: Iterable[int]) -> float:
        """The weight of some micro-batches of a round, which may be none, added up along the tree."""
        weights = {k: self.weight(Task(round_, k)) for k in ks}
        return fold(weights, self.round(round_).micro_batches, operator.add) if weights else 0.0

    @property
    def keeps_event_log(self) -> bool:
        """Return True if the event log is a real file, which a later coordinator can read."""
        return bool(self.killed or self.stopped or self.told) or self.folder is not None

    def plans(self) -> list[Segment]:
        out: list[Segment] = []
        for samples, epochs in self.segments:
            out.append(
                make_segment(
                    before=out[-1] if out else None,
                    samples=samples,
                    global_batch=self.settings.global_batch,
                    micro_batch=self.settings.micro_batch,
                    epochs=epochs,
                    round_limit=self.settings.rounds,
                )
            )
        return out

    def micro_batches(self) -> list[Task]:
        """Return all micro-batches of the run, in order."""
        rounds = [segment.round(r) for segment in self.plans() for r in range(segment.first_round, segment.end)]
        return [Task(plan.index, k) for plan in rounds for k in range(plan.micro_batches)]

    def round(self, index: int) -> Any:
        return next(segment.round(index) for segment in self.plans() if segment.first_round <= index < segment.end)


# ---- the model


class Model(nn.Module):
    """The model of the module's docstring.

    `rare` has a gradient in even rounds only. `late` and `kept` are frozen at first. `late` has a gradient in the second round,
    the fifth and so on, and `kept` has none. `mean`, `most`, `seen` and `latest` are buffers, one of each kind. Not every
    micro-batch changes `latest`.
    """

    RULES: ClassVar[dict[str, BufferRule]] = {"mean": "mean", "most": "max", "seen": "sum"}

    def __init__(self, case: Case, sparse: bool = True) -> None:
        super().__init__()
        self.case = case
        self.number = {task: n for n, task in enumerate(case.micro_batches())}
        is_coded = case.settings.compress_gradients != "none"
        self.account = nn.Parameter(torch.zeros(len(self.number), 1) if is_coded else torch.zeros(len(self.number)))
        self.a = nn.Parameter(torch.linspace(-1, 1, 3))
        self.b = nn.Parameter(torch.linspace(0, 1, 7) ** 2)
        self.c = nn.Parameter(torch.full((2, 2), 0.3))
        self.rare = nn.Parameter(torch.ones(2))
        self.late = nn.Parameter(torch.linspace(-2, 2, 6), requires_grad=False)
        self.kept = nn.Parameter(torch.arange(5), requires_grad=False)
        self.mean: torch.Tensor
        self.most: torch.Tensor
        self.register_buffer("mean", torch.full((3,), 0.7))
        self.register_buffer("most", torch.zeros(2, dtype=torch.int64))
        self.seen: torch.Tensor
        self.register_buffer("seen", torch.zeros(len(self.number), dtype=torch.int32))
        self.latest: torch.Tensor
        self.register_buffer("latest", torch.zeros(2, dtype=torch.complex64))
        self.rows = case.rows
        self.table: nn.Embedding = None  # type: ignore[assignment]
        self.head: ShardedLinear = None  # type: ignore[assignment]
        if case.rows:
            self.table = nn.Embedding(case.rows + len(self.number), 2, sparse=sparse)
            with torch.no_grad():
                self.table.weight.copy_(torch.linspace(-1, 1, 2 * len(self.table.weight)).view(-1, 2))
                self.table.weight[case.rows :] = 0.0
        self.classes = case.classes
        if case.classes:
            #: One class on each server, in a block of its own. Its row is an account.
            self.counting = torch.arange(0, case.classes, BLOCK)[: case.settings.servers]
            self.head = ShardedLinear(3 + len(self.number), case.classes)

    def groups(self) -> list[dict[str, Any]]:
        """Return parameter groups for an optimizer. The table's group has no momentum."""
        table = [self.table.weight] if self.rows else []
        return [
            {"params": [p for p in self.parameters() if all(p is not t for t in table)]},
            *({"params": [t], "momentum": 0.0} for t in table),
        ]

    def ids(self, task: Task) -> torch.Tensor:
        """Return the rows that a micro-batch looks up. The last one is the row of its account."""
        generator = torch.Generator().manual_seed(2000 * task.round + task.k)
        return torch.cat([torch.randint(self.rows, (5,), generator=generator), torch.tensor([self.rows + self.number[task]])])

    def samples(self, task: Task) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features and labels of a micro-batch for the sharded layer: two random samples, then one for each account.

        No other micro-batch has the features of an account's sample. All its classes are about equally likely, so that its
        gradient is known.
        """
        generator = torch.Generator().manual_seed(3000 * task.round + task.k)
        features = torch.zeros(2 + len(self.counting), 3 + len(self.number))
        features[:2, :3] = torch.randn(2, 3, generator=generator) * self.a.detach()
        features[2:, 3 + self.number[task]] = TALLY
        return features, torch.cat([torch.randint(self.classes, (2,), generator=generator), self.counting])

    @torch.no_grad()
    def compute(self, task: Task) -> None:
        """Do a micro-batch's forward and backward: set the gradients and change the buffers. With weight 0 both are NaN."""
        is_lost = self.case.given(task) == 0.0
        generator = torch.Generator().manual_seed(1000 * task.round + task.k)
        self.account.grad = torch.zeros_like(self.account)
        self.account.grad[self.number[task]] = 1.0
        for parameter in (self.a, self.b, self.c):
            parameter.grad = torch.randn(parameter.shape, generator=generator) + parameter.sin() + self.mean.sum()
        self.rare.grad = torch.randn(2, generator=generator) + self.rare if task.round % 2 == 0 else None
        self.late.grad = torch.randn(6, generator=generator) + self.late if task.round % 3 == 1 else None
        self.mean.mul_(0.9).add_(torch.randn(3, generator=generator))
        self.most[task.k % 2] += task.k
        self.seen[self.number[task]] += 1
        if (task.round + task.k) % 3:
            self.latest = self.latest + self.number[task] * 1j  # a new tensor, as some scripts make
        if self.rows:
            factors = torch.randn(2, generator=generator)
            with torch.enable_grad():
                looked_up = self.table(self.ids(task))
                # each row's gradient depends on all rows, on whatever server they are
                loss = (looked_up[:5].sum(0).sin() * factors).sum() + looked_up[5:].sum()
                (loss * float("nan") if is_lost else loss).backward()
        if self.classes:
            features, labels = self.samples(task)
            with torch.enable_grad():
                sharded_cross_entropy(features.requires_grad_(), labels, self.head).backward()
            if features.grad is not None:  # None if the servers did not have the version any more
                self.a.grad = self.a.grad + features.grad[:, :3].sum(0)
        if is_lost:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))
            if self.case.settings.policy not in ("local", "average"):  # where a script's buffers are its own
                self.mean.fill_(float("nan"))


HEAD = "head"
#: The feature of an account's sample in the sharded layer. It is small, so that it moves logits little.
TALLY = 0.01


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of a model's state_dict, without tensors that servers keep."""
    return {name: value.detach().clone() for name, value in model.state_dict().items() if not value.is_meta}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Return True if all common tensors are equal. The sign of zeros does not matter."""
    return all(torch.equal(a[name], b[name]) for name in a.keys() & b.keys())


def first_head(case: Case) -> torch.Tensor:
    """Return the sharded layer's rows at the beginning of a run."""
    model = Model(case)
    update = Update("SGD", plain_settings(example_optimizer(torch.optim.SGD, model.groups(), {"lr": case.lr})))
    return sharded(model, case.settings.servers, update, case.settings.seed)[1].rows()


def sequential(case: Case, counted: dict[int, list[int]] | None = None) -> list[dict[str, torch.Tensor]]:
    """Return the weights before each round and the final ones, from a plain loop that sums along the reduction tree.

    `counted` has the micro-batches that count in each round. None: all.
    """
    model = Model(case, sparse=False)
    hyper = {"lr": case.lr, "momentum": case.momentum}
    update = Update("SGD", plain_settings(example_optimizer(torch.optim.SGD, model.groups(), hyper)))
    shards, classes = sharded(model, case.settings.servers, update, case.settings.seed)
    parameters = {name: p for name, p in model.named_parameters() if not p.is_meta}
    optimizer = torch.optim.SGD(model.groups(), lr=case.lr, momentum=case.momentum)
    out = [state(model)]
    for index in sorted({task.round for task in case.micro_batches()}):
        plan = case.round(index)
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        sums: dict[str, dict[int, torch.Tensor]] = {name: {} for name in [*parameters, *buffers]}
        ks = range(plan.micro_batches) if counted is None else counted[index]
        total = case.weight_of(index, ks)
        for k in ks:
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
            latest = model.latest
            model.zero_grad()
            model.compute(Task(index, k))
            samples, weight = plan.samples_in(k, k + 1), case.weight(Task(index, k))
            for name, parameter in parameters.items():
                is_nothing = parameter.grad is None or not weight
                sums[name][k] = torch.zeros_like(parameter) if is_nothing else parameter.grad * weight  # type: ignore[operator]
            sums["mean"][k] = model.mean * weight if weight else torch.zeros_like(model.mean)
            sums["most"][k] = model.most.clone()
            sums["seen"][k] = model.seen - buffers["seen"]
            if model.latest is not latest:
                sums["latest"][k] = model.latest.clone()
            shards.push(LayerPush(index, k, k + 1, samples, [], weight=weight), shards.contribution(weight), {})
        for name, parameter in parameters.items():
            if not total:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad = fold(sums[name], plan.micro_batches, torch.add) / total
        factor = None
        if case.clip_norm is not None and case.classes and total:
            dense = [p.grad for p in parameters.values() if p.grad is not None]
            norms = [float(torch.linalg.vector_norm(one)) for one in dense] + [norm for _, _, norm in classes.norms(total)]
            factor = torch.clamp(case.clip_norm / (torch.linalg.vector_norm(torch.tensor(norms)) + 1e-6), max=1.0)
            for one in dense:
                one.mul_(factor)
        elif case.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters.values(), case.clip_norm)
        classes.close(total, factor=factor)
        optimizer.step()
        model.mean.copy_(fold(sums["mean"], plan.micro_batches, torch.add) / total if total else buffers["mean"])
        model.most.copy_(fold(sums["most"], plan.micro_batches, torch.maximum))
        model.seen.copy_(buffers["seen"] + fold(sums["seen"], plan.micro_batches, torch.add))
        model.latest.copy_(sums["latest"][max(sums["latest"])] if sums["latest"] else buffers["latest"])
        out.append(state(model))
    if case.classes:
        out[-1][HEAD] = classes.rows()
    return out


# ---- the world


class Port:
    """A simulated socket of a process, with the methods that the real code uses. Without `peer` it is a ROUTER."""

    def __init__(self, process: Process, peer: str | None) -> None:
        self.inbox: deque[list[zmq.Frame]] = deque()
        self._rest: deque[zmq.Frame] = deque()
        self._process = process
        self.peer = peer
        self.closed = False

    def send_multipart(self, parts: Sequence[Any], flags: int = 0, copy: bool = True) -> None:
        data = [bytes(part) for part in parts]
        to = self.peer or data.pop(0).decode()
        self._process.world.post(self._process.key, to, data)

    def recv(self, flags: int = 0, copy: bool = True) -> zmq.Frame:
        """Return the next frame of the current message, or the first one of the next message."""
        if not self._rest:
            if not self.inbox:
                raise zmq.Again
            self._rest.extend(self.inbox.popleft())
            for frame in self._rest:
                frame.more = frame is not self._rest[-1]
        return self._rest.popleft()

    def poll(self, ms: float) -> None:
        """Let the world go on for `ms` milliseconds. Raises Killed if the process is gone then."""
        world = self._process.world
        world.run(lambda: False, world.now + ms / 1000)
        if self.closed:
            raise Killed

    def close(self, linger: int = 0) -> None:
        self.closed = True


class Killed(Exception):
    """Raised in place of a process's sudden end."""


class World:
    """The clock, the network and the processes of one run."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.now = 100.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.random = random.Random(case.seed)
        self.processes: dict[str, Process] = {}
        self.pids = itertools.count(1)
        #: How often a worker gave up a micro-batch because its weights were gone, and restarted because it counted as lost.
        self.given_up = self.fenced = 0
        #: How many processes were killed, and how often all restarted.
        self.killed = self.restarts = 0
        #: How often the run stopped after a signal, and how often a member left after one.
        self.stopped = self.left = 0
        #: How often a server did not have the version any more that a worker asked about.
        self.asked_too_late = 0
        #: Workers that have started or will start.
        self.expected: set[str] = {f"worker-{number}" for number in range(len(case.paces))}
        #: (worker, micro-batch) of each computation.
        self.computed: list[tuple[str, Task]] = []
        #: By run id and round: the weights that workers computed from. A run that restarts gets another id.
        self.weights: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
        self.starting: Process | None = None
        self.over = False
        self._count = 0

    def at(self, when: float, what: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self.events, (when, self._count, what))

    def post(self, sender: str, to: str, data: list[bytes]) -> None:
        network = self.case.network
        for _ in range(1 + (self.random.random() < network.twice)):
            if self.random.random() >= network.loss and not self._is_cut(sender, to):
                self.at(self.now + self.random.uniform(0.0005, network.delay_s), lambda: self._deliver(sender, to, data))

    def _is_cut(self, *ends: str) -> bool:
        found = [self.processes.get(end) for end in ends]
        return "coordinator" in ends and any(isinstance(end, WorkerProcess) and end._is_cut_off() for end in found)

    def _deliver(self, sender: str, to: str, data: list[bytes]) -> None:
        process = self.processes.get(to)
        if process is not None and process.alive and not process.is_deaf_to(data[0]):
            process.deliver(sender, [zmq.Frame(part) for part in data])

    @property
    def coordinator(self) -> Coordinator:
        process: Any = self.processes["coordinator"]
        found: Coordinator = process.coordinator
        return found

    def newest(self, place: str) -> Process | None:
        """Return the last process that was started in `place`, or None."""
        return next((process for process in reversed(self.processes.values()) if process.place == place), None)

    def versions(self, run: str) -> list[int]:
        """Return the versions of the servers that have chunks in the run with id `run`."""
        servers = [p for p in self.processes.values() if isinstance(p, ServerProcess) and p.alive and p.server._stamp.run == run]
        hosts = [p.host for p in servers if p.server._shard is not None]
        return [h.version for h in hosts if not h.restoring and h.shard is not None and h.shard.model.chunks]

    def run(self, ready: Callable[[], Any], until: float = float("inf")) -> Any:
        """Let events happen until `ready()` is true, and return its result. Return None if the time `until` comes first.

        Raises AssertionError if the run hangs.
        """
        while not (value := ready()):
            if not self.events or self.events[0][0] > min(until, 100.0 + _LIMIT_S):
                if until < 100.0 + _LIMIT_S:
                    self.now = until
                    return None
                raise AssertionError(f"the run hangs: {self.describe()}")
            self.now, _, what = heapq.heappop(self.events)
            what()
        return value

    def count_given_up(self, give_up: Callable[[Contributor], None]) -> Callable[[Contributor], None]:
        def counting(work: Contributor) -> None:
            self.given_up += 1
            give_up(work)

        return counting

    def end_scripts(self) -> None:
        """End all scripts, wherever they wait, so that a failed run leaves no threads for the next test."""
        for process in self.processes.values():
            if isinstance(process, WorkerProcess):
                process.script.end()

    def describe(self) -> str:
        return "; ".join(process.describe() for process in self.processes.values())

    def start(self, process: Process) -> None:
        self.processes[process.key] = process
        self.starting = process
        process.begin()
        self._tick(process)

    def _tick(self, process: Process) -> None:
        if process.alive:
            process.tick()
            self.at(self.now + _TICK_S * self.random.uniform(0.8, 1.2), lambda: self._tick(process))


class Restarted(Exception):
    """Raised in place of replacing the process by a new one of the same command."""


class Interrupted(Exception):
    """Raised in place of a second signal's end of the script."""


def _restart(options: Sequence[str] | None = None) -> None:
    raise Restarted


class Process:
    """A simulated process. It gets messages and ticks."""

    def __init__(self, world: World, key: str) -> None:
        self.world = world
        self.key = key
        self.alive = True

    @property
    def place(self) -> str:
        """Return the name of the first process in this one's place."""
        return self.key.partition(".")[0]

    def kill(self, away: float) -> None:
        """End the process at once. Start another one in its place after `away` seconds."""
        raise NotImplementedError

    def tell(self, away: float) -> None:
        """Tell the process to stop, as a signal does. Start another one in its place `away` seconds after its end."""
        raise NotImplementedError

    def is_deaf_to(self, header: bytes) -> bool:
        return False

    def begin(self) -> None:
        raise NotImplementedError

    def deliver(self, sender: str, frames: list[zmq.Frame]) -> None:
        raise NotImplementedError

    def tick(self) -> None:
        raise NotImplementedError

    def describe(self) -> str:
        return self.key


class CoordinatorProcess(Process):
    """The coordinator. Its run directory is `folder`. When it is killed, everything that is not on the disk is lost."""

    def __init__(self, world: World, key: str, folder: Path) -> None:
        super().__init__(world, key)
        self.folder = folder
        #: True while the coordinator tells members that all restart or end.
        self.leaves = False
        #: Seconds until the run is started again after a stop.
        self.away = 0.2

    def begin(self) -> None:
        self._start(run_to_resume(self.folder)[0] if self.world.case.resume else None)

    def _start(self, restored: RestoredRun | None, recovers: bool = False) -> None:
        self.port = Port(self, None)
        case = self.world.case
        transport: Literal["auto", "tcp"] = "auto" if case.memory else "tcp"
        every = 0.7 if case.folder is not None else 0.0
        settings = msgspec.structs.replace(case.settings, checkpoint_every=every, transport=transport)
        self.coordinator = Coordinator(self.port, settings, self.folder, restored, recovers)  # type: ignore[arg-type]
        self.log: RecordedLog = self.coordinator.context.log  # type: ignore[assignment]
        self.alive, self.leaves = True, False
        if self.world.case.keeps_event_log:
            self.coordinator.context.log._db.execute("PRAGMA synchronous=OFF")  # the machine does not crash

    def kill(self, away: float) -> None:
        self.world.killed += 1
        self._end(away, self._recover)
        self.coordinator.context.log._db.close()

    def stop(self, away: float) -> None:
        """Tell the coordinator to stop, as a signal does. Start the run again `away` seconds after its end."""
        if self.alive and not self.leaves and not self.world.over and self.coordinator.farewell.stop is None:
            self.away = away
            self._until_it_ends(lambda: self.coordinator.stopping.request(15))

    def _end(self, away: float, then: Callable[[], None]) -> None:
        self.alive = False
        self.port.close()
        self.world.at(self.world.now + away, then)

    def _recover(self) -> None:
        self._start(run_to_recover(self.folder), recovers=True)
        if (stop := self.coordinator.farewell.stop) is not None:
            self.world.restarts += 1
            self._leave(lambda: self.coordinator.farewell.end_as_decided(stop))
        self.world._tick(self)

    def _leave(self, tell: Callable[[], None], away: float = 0.2) -> None:
        """Let `tell` tell all members to restart, and restart `away` seconds later."""
        self.leaves = True
        try:
            with suppress(RestartRun, RunStopped):
                tell()
        except Killed:  # the coordinator was killed meanwhile
            return
        self._end(away, self._restart)

    def _restart(self) -> None:
        self._start(run_to_resume(self.folder)[0])
        self.world._tick(self)

    def finish(self) -> None:
        """Write the last rows to the event log, and read it into `log`."""
        self.coordinator.context.flush()
        if self.world.case.keeps_event_log:
            reader = RunLogReader(self.folder / FILE_NAME)
            self.log = RecordedLog(self.folder)
            self.log.rounds, self.log.contributions = reader.rounds(), reader.contributions()
            self.log.events = [event for _, _, event in reader.events()]
            reader.close()
            self.coordinator.context.log.close()

    @property
    def ledger(self) -> Any:
        return self.coordinator.context.ledger

    def deliver(self, sender: str, frames: list[zmq.Frame]) -> None:
        self.port.inbox.append([zmq.Frame(sender.encode()), *frames])
        self.coordinator.drain()

    def tick(self) -> None:
        if not self.leaves:
            self._until_it_ends(lambda: self.coordinator.tick(self.world.now))

    def _until_it_ends(self, what: Callable[[], None]) -> None:
        """Call `what`. If it raises that the run restarts or stops, tell all members and start the run again."""
        try:
            what()
        except RestartRun as error:
            reason = str(error)
            self.world.restarts += 1
            self._leave(lambda: self.coordinator.farewell.restart(reason))
        except Stopped:
            self.world.stopped += 1
            self._leave(lambda: self.coordinator.farewell.say(Stop(False, "it was told to.", on_request=True)), self.away)

    def describe(self) -> str:
        return f"{self.ledger.committed} rounds committed of {self.ledger.planned}"


class ServerProcess(Process):
    """A server. Its `key` is server-N, or server-N.M if it replaces another process."""

    #: Seconds until another process replaces one that was told to stop.
    away = 0.3

    def begin(self) -> None:
        self.number = number_of(self.place)
        self.server = _Server(self, _COORDINATOR, f"tcp://{self.key}:1", self.number)  # type: ignore[arg-type]

    def kill(self, away: float) -> None:
        self.world.killed += 1
        self._end(away)

    def tell(self, away: float) -> None:
        self.away = away
        self._until_it_leaves(lambda: self.server.stop(15))

    def _until_it_leaves(self, what: Callable[[], None]) -> None:
        try:
            what()
        except Stopped:
            self.world.left += 1
            self._end(self.away)

    def _end(self, away: float) -> None:
        """End the process. Start another one in its place after `away` seconds."""
        self.alive = False
        self.world.at(self.world.now + away, lambda: self.world.start(ServerProcess(self.world, self._next_key)))

    @property
    def _next_key(self) -> str:
        """Return the key of the next process in this place: server-0, server-0.1, server-0.2, ..."""
        place, _, number = self.key.partition(".")
        return f"{place}.{int(number or 0) + 1}"

    def kill_once_copied(self, away: float) -> None:
        """Kill the process as soon as every shard has a copy."""
        membership, servers = self.world.coordinator.context.membership, self.world.case.settings.servers
        if not self.alive or self.world.over:
            return
        there = [_newest_of(self.world, number) for number in range(servers)]
        known = {
            server.incarnation for server in membership.servers.values() if server.active and membership.backups.exists(server)
        }
        if len(known) < servers or not all(one.alive and one.server._stamp.incarnation in known for one in there):
            self.world.at(self.world.now + 0.05, lambda: self.kill_once_copied(away))
        else:
            self.kill(away)

    def _restart_if_told(self) -> None:
        stop = self.server._attendance.stop
        if stop is not None and self.alive:
            assert stop.restart or stop.on_request, f"{self.key} is told to stop: {stop.reason}"
            self.world.left += self.server.stop_signal > 0
            self._end(self.away if self.server.stop_signal else 0.3)  # a launcher starts it again

    @property
    def host(self) -> ShardHost:
        assert self.server._shard is not None
        return self.server._shard

    @property
    def shard(self) -> Shard:
        assert self.host.shard is not None
        return self.host.shard

    def _work(self) -> None:
        """Do a little long work, and come back for more."""
        if not self.alive or self.server._shard is None:
            return
        self.server._do(self.server._shard.work(self.world.now))
        if self.server._shard.busy:
            self.world.at(self.world.now + self.world.random.uniform(0.001, 0.03), self._work)

    def deliver(self, sender: str, frames: list[zmq.Frame]) -> None:
        idle = self.server._shard is None or not self.server._shard.busy
        backup: Any = self.server._connections.backup
        if backup is not None and sender == backup.peer and self._is_from_backup(frames):
            backup.inbox.append(frames)
            self.server._drain(backup)
        elif sender == "coordinator":
            self.server._coordinator.inbox.append(frames)  # type: ignore[attr-defined]
            self.server._drain(self.server._coordinator)
        else:
            self.server._workers.inbox.append([zmq.Frame(sender.encode()), *frames])  # type: ignore[attr-defined]
        if self.server._shard is not None and not self.server._shard.restoring:
            self.server._drain(self.server._workers)
        if idle:
            self._work()
        self._restart_if_told()

    def tick(self) -> None:
        now = self.world.now
        self._until_it_leaves(lambda: self.server._look_for_signal(now))
        if not self.alive:
            return
        for body in self.server._attendance.tick(now, self.server._tell):
            self.server._coordinator.send_multipart([self.server._stamp.encode(body)])
        if self.server._shard is not None:
            self.server._do(self.server._shard.tick(now))
            self.server._finish_saving()
            self.server._save()
            self._work()

    def _is_from_backup(self, frames: list[zmq.Frame]) -> bool:
        """Return True if a message belongs to the socket to the backup. With two servers the backup is the primary server too."""
        try:
            body = self.server._stamp.open(frames[0].buffer).read()
        except WireError:
            return False
        return isinstance(body, RoundReplicatedAck) or (
            isinstance(body, StateHeader | StatePart | StatePartAck) and body.shard == self.number
        )

    def describe(self) -> str:
        shard = self.server._shard
        return f"{self.key} at {shard.version} misses {shard.missing()}" if shard is not None else self.key


# ---- workers


class ScriptEnded(BaseException):
    """Raised in a script that waits when the world is over."""


class ScriptThread:
    """A worker's script. It runs only while the world waits in `go_on`."""

    def __init__(self, script: Callable[[], None]) -> None:
        self._script = script
        self._thread = threading.Thread(target=self._run, daemon=True)
        #: Released when the script may run.
        self._may_run = threading.Lock()
        #: Released when the world may go on.
        self._may_go_on = threading.Lock()
        self._may_run.acquire()
        self._may_go_on.acquire()
        self._error: BaseException | None = None
        self._is_over = False
        #: True once the script has returned or raised.
        self.ended = False
        #: While the script waits: the latest time at which it goes on.
        self.until = float("inf")

    def go_on(self) -> None:
        """Let the script run until it waits or ends. Raises its exception."""
        if not self._thread.ident:
            self._thread.start()
        else:
            self._may_run.release()
        self._may_go_on.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self, until: float) -> None:
        """Let the world go on. The script's thread calls this."""
        if self._is_over:
            raise ScriptEnded
        self.until = until
        self._may_go_on.release()
        self._may_run.acquire()
        if self._is_over:
            raise ScriptEnded

    def end(self) -> None:
        """End a script that waits."""
        self._is_over = True
        if self._thread.ident and not self.ended:
            self.go_on()

    def _run(self) -> None:
        try:
            self._script()
        except ScriptEnded:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.ended = True
            self._may_go_on.release()


class SimulatedCondition(threading.Condition):
    """The condition of a script's thread. A script that waits for it lets the world go on."""

    def __init__(self, process: WorkerProcess) -> None:
        super().__init__()
        self._process = process

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        saved = self._release_save()  # type: ignore[attr-defined]
        try:
            self._process.script.wait(self._process.world.now + timeout)
        finally:
            self._acquire_restore(saved)  # type: ignore[attr-defined]
        return True

    def notify_all(self) -> None:
        self._process.is_notified = True


class SimulatedLink(IoThread):
    """The real link without its thread. Messages go out at once, and a wait lets the world go on."""

    def __init__(self, process: WorkerProcess, hello: Hello) -> None:
        self.process = process
        super().__init__(_COORDINATOR, hello)
        self.lock = SimulatedCondition(process)

    def request(self, to: str, body: Body, *others: Any, **more: Any) -> Body:
        shares_with_one = self.process.world.case.memory == "beside"
        if shares_with_one and isinstance(body, OfferSharedMemory) and number_of(to) != self.process.beside:
            return SharedMemoryReply(False, None)
        return super().request(to, body, *others, **more)

    def _notify(self) -> None:
        if self.process.alive:
            self._send_all()

    def interrupt(self) -> None:
        raise Interrupted

    def close(self) -> None:
        pass


class WorkerProcess(Process):
    """A worker and its script."""

    run: Run

    def __init__(self, world: World, key: str, pace: Pace, index: int | None = None, pid: int | None = None) -> None:
        super().__init__(world, key)
        #: The process id in its Hello.
        self.pid = next(world.pids) if pid is None else pid
        #: The number that it asks for.
        self.index = number_of(key) if index is None else index
        self.pace = pace
        self.done = self.breaks = False
        #: What the script got when workers decided together.
        self.decided: list[Any] = []
        #: `run.round` and the weights at each call of the script's function for the end of a round.
        self.ended: list[tuple[int, dict[str, torch.Tensor]]] = []
        #: The round with whose weights this worker began.
        self.began = 0
        self.model = Model(world.case)
        self._welcomed_at = float("inf")
        self.script = ScriptThread(self._live)
        #: True if news has come since the script began to wait.
        self.is_notified = False
        #: The script sleeps until this time, whatever comes.
        self._sleeps_until = float("-inf")

    def is_deaf_to(self, header: bytes) -> bool:
        if not self.pace.deaf_s[0] <= self.world.now - 100.0 < self.pace.deaf_s[1]:
            return False
        body = self.link.connections.stamp.open(header).read()
        return isinstance(body, Weights) and 0 in body.chunks

    @property
    def useful(self) -> bool:
        """Return True if the script will come to an end.

        It will not if the worker hangs. Nor will it if the worker waits in place of one whose script had ended, under a policy
        with local steps.
        """
        members = self.world.coordinator.context.membership.workers.values()
        waits = self.link._attendance.welcome is None and load(self.world.case.settings).is_local
        is_late = waits and any(m.left and m.hello.index == self.index for m in members)
        return self.alive and self.pace.hangs_s == float("inf") and not is_late

    @property
    def place(self) -> str:
        return f"worker-{self.index}"

    def _is_cut_off(self) -> bool:
        since, until = self.pace.cut_off_s
        return since <= self.world.now - self._welcomed_at < until

    def begin(self) -> None:
        place = here() if self.world.case.near else Place()
        self.link = SimulatedLink(self, Hello("worker", self.index, pid=self.pid, place=place))
        self._go_on()

    def _die(self) -> None:
        self.kill(self.pace.restart_s)

    #: Seconds until another process replaces one that was told to stop.
    away = 0.3

    def tell(self, away: float) -> None:
        self.away = away
        if self.link._attendance.welcome is None or not hasattr(self, "run") or self.done:
            self.kill(away)
        else:
            try:
                self.session.on_stop_signal(15)
            except Stopped:
                self._interrupted()

    def _interrupted(self) -> None:
        """Give up the script's work, and say goodbye."""
        self.link._outbox.clear()
        self.link._outbox.append(Send(COORDINATOR, Goodbye(early=True, round=self.run.round)))
        self.link.stop_signal = 0
        self.link._send_all()
        self.alive = False
        self._has_left()

    def _has_left(self) -> None:
        self.world.left += 1
        if self.away < float("inf"):
            self.world.at(self.world.now + self.away, lambda: self.world.start(self._successor(None)))

    def kill(self, away: float) -> None:
        self.alive = False
        self.world.killed += 1
        if away < float("inf"):
            self.world.at(self.world.now + away, lambda: self.world.start(self._successor(None)))

    def _break_off(self) -> None:
        """Make the script leave its loop at the next batch."""
        self.breaks = True

    def _fail(self) -> None:
        self.link.send(Send(COORDINATOR, Goodbye("nothing came.", cut_off=self.pace.finds_no_server)))
        self._die()

    def restart(self) -> None:
        """End the process because the coordinator told it to restart. Start it again after 0.3 s."""
        self.alive = False
        self.world.fenced += 1
        self.world.at(self.world.now + 0.3, lambda: self.world.start(self._successor(self.pid)))

    def _successor(self, pid: int | None) -> WorkerProcess:
        """Return a worker with the same speed and no faults, which asks for the same number."""
        number = sum(isinstance(process, WorkerProcess) for process in self.world.processes.values())
        key = next(f"worker-{n}" for n in range(number + 100) if f"worker-{n}" not in self.world.expected)
        self.world.expected.add(key)
        return WorkerProcess(self.world, key, Pace(self.pace.compute_s, self.pace.pause_s), self.index, pid)

    def deliver(self, sender: str, frames: list[zmq.Frame]) -> None:
        port: Any = self.link.connections._sockets.get(sender.partition(".")[0])
        if port is not None and port.peer == sender:
            port.inbox.append(frames)
            try:
                self.link._receive(port)
            except Restarted:
                self.restart()
                return
            except Interrupted:
                self._interrupted()
                return
            if (stop := self.link._attendance.stop) is not None and stop.on_request and not self.done:
                self.restart()
                return
            self.link._send_all()
            self._look()

    def tick(self) -> None:
        try:
            self.link._send_all()
        except Interrupted:
            self._interrupted()
            return
        self._look()

    def describe(self) -> str:
        if not self.alive or self.done or not hasattr(self, "run"):
            return f"{self.key} {'done' if self.done else 'alive' if self.alive else 'dead'}"
        work = self.session.work
        return f"{self.key} at {work.heartbeat() if work is not None else 'start'}"

    def _look(self) -> None:
        """Let the script go on if there is news, or if it has waited long enough."""
        while self.alive and not self.script.ended:
            is_due = self.world.now >= self.script.until
            if self.world.now < self._sleeps_until or not (self.is_notified or is_due):
                return
            self._go_on()

    def _go_on(self) -> None:
        self.is_notified = False
        try:
            self.script.go_on()
        except Interrupted:
            self._interrupted()
        if self.script.ended:
            self.alive = self.alive and self.done  # a script that ended before it was done has left
        elif self.script.until < float("inf"):
            self.world.at(max(self.script.until, self._sleeps_until), self._look)

    @property
    def beside(self) -> int:
        """Return the number of the server that shares memory with this worker, if only one does."""
        return number_of(self.place) % self.world.case.settings.servers

    # ---- the script

    def begins(self, task: Task) -> float:
        """Record that the worker begins `task`, and check the policy's lead. Return the seconds that the task takes."""
        world, case = self.world, self.world.case
        world.computed.append((self.key, task))
        policy = load(case.settings)
        versions = world.versions(self.link.connections.stamp.run)
        if versions and not policy.is_local:
            lead = task.round - min(versions)
            assert policy.may_start(task.round, min(versions)), f"{self.key} leads by {lead} rounds"
        if world.now >= self._welcomed_at + self.pace.hangs_s:
            return float("inf")
        return self.pace.compute_s * world.random.uniform(0.7, 1.3)

    def has_weights(self, task: Task, weights: dict[str, torch.Tensor]) -> None:
        """Check that all workers have the same weights for `task`."""
        world, policy = self.world, load(self.world.case.settings)
        run = self.link.connections.stamp.run
        if policy.applies == "round" and task.round == min(world.versions(run), default=-1):
            first = world.weights.setdefault((run, task.round), weights)
            assert same(first, weights), f"{self.key} computes round {task.round} from other weights"

    def _live(self) -> None:
        """Run the script as a worker's process does: schedule its faults, train, and finish."""
        self.session = session = Session(self.link)
        self.run = run = Run(session)
        now, pace = self.world.now, self.pace
        self._welcomed_at = now
        plans = [
            (pace.dies_s, self._die),
            (pace.leaves_s, run.leave),
            (pace.breaks_s, self._break_off),
            (pace.fails_s, self._fail),
        ]
        for after_s, what in plans:
            if after_s < float("inf"):
                self.world.at(now + after_s, what)
        try:
            try:
                self._train(run)
            except SystemExit:
                run.finish()
                if self.link.stop_signal:
                    self._has_left()
            else:
                self.session.ending.await_reports()
                self.done = True
                run.finish()
        finally:
            self.session.release_model()

    def _train(self, run: Run) -> None:
        """Train as a user's script does."""
        case = self.world.case
        run.merge_by(lambda model: 0.0)
        run.replicate(self.model, Model.RULES)
        opt = run.optimizer(torch.optim.SGD, self.model.groups(), lr=case.lr, momentum=case.momentum, clip_norm=case.clip_norm)
        if self.pace.on_round_s >= 0:
            run.on_round(lambda: self._on_round(run))
        self.began = run.round
        for samples, epochs in case.segments:
            for _ in run.batches(Numbers(samples), epochs=epochs, shuffle=False):
                assert not self.session.departure.is_end(self.session.work.updates)  # type: ignore[union-attr]
                work = self.session.work
                assert work is not None and work.batch.task is not None
                task = work.batch.task
                self._sleep(self.begins(task))
                if self.breaks:
                    raise SystemExit
                if isinstance(work, GradientLoop):
                    self._compute(work, task)
                else:
                    self.model.compute(task)
                run.log(loss=float(task.k))
                if self.pace.ends_before_step:
                    self._end_if_due(run)
                opt.step(weight=case.given(task))
                if self._end_if_due(run) and self.pace.then_breaks:
                    break
                if self.pace.pause_s:
                    self._sleep(self.pace.pause_s * self.world.random.random())
            if case.decides:
                self._decide(run)

    def _on_round(self, run: Run) -> None:
        """Keep the weights, as they are after some time."""
        if self.pace.on_round_s:
            self._sleep(self.pace.on_round_s * self.world.random.random())
        self.ended.append((run.round, state(self.model)))
        if run.round >= self.pace.hook_ends_round:
            run.stop(f"{self.key} has seen enough")

    def _decide(self, run: Run) -> None:
        """Agree on a value, and evaluate on more batches than there are workers."""

        def measure(batch: torch.Tensor) -> dict[str, float]:
            self._sleep(self.pace.compute_s * self.world.random.random())
            return {"total": float(batch.double().mean()) + 0.1}

        run.save("newest")
        agreed = run.agree({"from": self.key, "round": run.round})
        self.decided.append((agreed, run.evaluate(measure, Numbers(17), micro_batch=2), run.agree(None)))

    def _end_if_due(self, run: Run) -> bool:
        """Ask for the run's end, if it is time. Whether it was."""
        is_due = self.world.now >= self._welcomed_at + self.pace.ends_s or run.round >= self.pace.ends_round
        if is_due:
            run.stop(f"{self.key} has seen enough")
        return is_due

    def _sleep(self, seconds: float) -> None:
        self._sleeps_until = self.world.now + seconds
        while self.world.now < self._sleeps_until:
            self.script.wait(self._sleeps_until)

    def residuals(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        """Yield the push codec's residuals: the tensor's name, where in it the residual begins, and values."""
        if not hasattr(self, "run") or self.session.training is None:
            return  # the worker came too late to train
        training = self.session.training
        layout, feedback = training.work.replica.layout, training.client._coder._feedback
        assert not feedback._pending
        for chunk, state in feedback._states.items():
            pieces = coded_pieces(layout, layout.chunks[chunk])
            parts = state["residual"].split([piece.length for piece in pieces])
            for piece, values in zip(pieces, parts, strict=True):
                yield layout.tensors[piece.tensor].name, piece.start, values

    def _compute(self, work: GradientLoop, task: Task) -> None:
        """Compute a micro-batch. Capture some gradients early, and change some of these again."""
        world, chance = self.world, self.world.random
        self.model.a.sum()
        weights = state(self.model)
        if not work._weights.round_invalid:
            self.has_weights(task, weights)
        self.model.compute(task)
        world.asked_too_late += work._shards.round_invalid
        for index, tensor in enumerate(work.replica.tensors):
            if tensor.grad is not None and chance.random() < 0.7:
                changes = chance.random() < 0.3
                if changes:
                    tensor.grad.mul_(2)
                work.replica.capture.catch(index, tensor)
                if chance.random() < 0.3:
                    self._sleep(0.02)
                if changes:
                    tensor.grad.data.mul_(0.5)


class Numbers(Dataset[int]):
    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> int:
        return index


# ---- a run


class RecordedLog:
    """An event log in memory, in place of the run's."""

    def __init__(self, path: Path) -> None:
        self.rounds: list[Any] = []
        self.contributions: list[Any] = []
        self.events: list[Any] = []

    def event(self, event: Any) -> None:
        self.events.append(event)

    def round(self, row: Any) -> None:
        self.rounds.append(row)

    def contribution(self, row: Any) -> None:
        self.contributions.append(row)

    def metric(self, *values: Any) -> None:
        pass

    def status(self, row: Any) -> None:
        pass

    def state(self, kind: str, key: str, value: bytes) -> None:
        pass

    def flush(self) -> None:
        pass


@dataclass
class Outcome:
    """The end of a run."""

    case: Case
    world: World
    #: By worker that came to the end: its final weights.
    models: dict[str, dict[str, torch.Tensor]]
    ledger: Any
    log: RecordedLog
    #: The servers' state machines, by number.
    hosts: list[ShardHost] = field(default_factory=list)
    #: By parameter: the sum of all workers' residuals, gradients x samples.
    unsent: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def shards(self) -> list[Shard]:
        return [host.shard for host in self.hosts if host.shard is not None]

    def table(self) -> torch.Tensor:
        """Return the embedding rows of all servers."""
        layout = self.shards[0].model.layout
        out = torch.empty(layout.tables[0].rows, layout.tables[0].dim)
        owners = owner_of(torch.arange(len(out)), len(self.shards))
        for server, shard in enumerate(self.shards):
            out[owners == server] = shard.model.tables._tables[0]._values
        return out

    def head(self) -> torch.Tensor:
        """Return the sharded layer's rows of all servers."""
        held = [shard.model.layers for shard in self.shards]
        for layers in held:
            layers.finish_updates()
        return rows_of([layers._layers[0] for layers in held])

    def tallies(self) -> list[torch.Tensor]:
        """Return the accounts of the sharded layer, each like `account`."""
        model = Model(self.case)
        moved = first_head(self.case) - self.head()
        loss = 1.0 / (2 + len(model.counting))
        slope = TALLY * loss * (1.0 - len(model.counting) / self.case.classes)  # from all samples of accounts
        return [row[3:] / slope for row in moved[model.counting]]

    def committed(self) -> dict[int, list[int]]:
        """Return by round the micro-batches that count, according to the ledger."""
        out: dict[int, list[int]] = {row.round: [] for row in self.log.rounds}
        for row in self.log.contributions:
            if row.outcome == "committed":
                out[row.round] += range(row.lo, row.hi)
        return {round_: sorted(ks) for round_, ks in out.items()}

    def counted(self, account: torch.Tensor | None = None) -> list[float]:
        """Return how often each micro-batch was counted, according to the weights of a run with lr=1 and no momentum.

        A micro-batch of weight w, in a round of weight W, moves its element by w/W. A micro-batch of weight 0 moves nothing. It
        counts as the ledger says.
        """
        account = next(iter(self.models.values()))["account"] if account is None else account
        out = []
        for n, task in enumerate(self.case.micro_batches()):
            weight = self.case.weight(task)
            committed = next(row.total_weight for row in self.log.rounds if row.round == task.round)
            if not weight:
                assert account[n] == 0.0
            out.append(-float(account[n]) * committed / weight if weight else float(task.k in self.committed()[task.round]))
        return out


class Mapped(Region):
    """A region of shared memory that the test closes at the end. Simulated processes do not close theirs."""

    there: ClassVar[list[Region]] = []

    def __init__(self, *values: Any) -> None:
        super().__init__(*values)
        self.there.append(self)

    @classmethod
    def close_all(cls) -> None:
        while cls.there:
            cls.there.pop().close()


@contextmanager
def _stand_ins(world: World) -> Iterator[None]:
    """Replace clocks, sockets and other things of the real code by those of `world`."""
    clock = SimpleNamespace(monotonic=lambda: world.now, sleep=lambda s: None, time=lambda: world.now)
    null = SimpleNamespace(setblocking=lambda flag: None, send=lambda data: None, close=lambda: None)

    def port(process: Process, address: str, watch: object = None) -> Port:
        return Port(process, address.removeprefix("tcp://").removesuffix(":1"))

    with ExitStack() as stack:
        stack.callback(Mapped.close_all)
        for module in (
            "roundtable.ps.coordinator.coordinator",
            "roundtable.ps.server.connections",
            "roundtable.ps.server.server",
            "roundtable.worker.client.connections",
            "roundtable.worker.client.io_thread",
            "roundtable.worker.client.kv_client",
            "roundtable.worker.contribute.backward_overlap",
            "roundtable.worker.contribute.contribution_pusher",
            "roundtable.worker.contribute.push_overlap",
            "roundtable.worker.loop.gradient_loop",
            "roundtable.worker.loop.weight_fetcher",
            "roundtable.worker.layers.sparse_embedding",
            "roundtable.worker.model_setup",
            "roundtable.worker.layers.sharded_linear",
            "roundtable.worker.loop.local_sgd",
            "roundtable.worker.merge.greedy_soup",
            "roundtable.worker.session.session",
        ):
            stack.enter_context(mock.patch(f"{module}.time", clock))
        replacements: dict[str, Any] = {
            "roundtable.common.codecs.chunks.MIN_NUMEL": 1,
            "roundtable.worker.replica.gradient_buffers._LARGE_BYTES": 0 if world.case.memory == "apart" else 1 << 30,
            "roundtable.common.protocol.shared_memory.Region": Mapped,
            "roundtable.worker.replica.lazy_weights.sys": SimpleNamespace(
                modules={}
            ),  # tests have loaded torch's compiler, with which a worker awaits all weights at once
            "roundtable.ps.updates.weight_versions.BUFFERS": world.case.weight_buffers,
            "roundtable.common.model.layout.CHUNK_BYTES": world.case.chunk_bytes,
            "roundtable.ps.shard.weights_sender.CREDIT_BYTES": world.case.credit * world.case.chunk_bytes,
            "roundtable.worker.client.dense.push_queue.CREDIT_BYTES": 2 * world.case.chunk_bytes,
            "roundtable.common.model.sparse_rows.CHUNK_BYTES": world.case.chunk_bytes,
            "roundtable.common.model.row_pages.CHUNK_BYTES": world.case.chunk_bytes,
            "roundtable.ps.coordinator.group_commit.RunLog": RunLog if world.case.keeps_event_log else RecordedLog,
            "roundtable.ps.server.server.Watchdog": mock.Mock(),
            "roundtable.worker.session.session.Watchdog": mock.Mock(),
            "roundtable.worker.session.ending._HAND_OVER_S": 1000.0,  # acknowledgements take long because messages are lost
            "roundtable.worker.session.assembly.new_incarnation": lambda: 0,
            "roundtable.ps.coordinator.parts.joining.Joining.is_dead": lambda coordinator, hello: False,
            "roundtable.ps.server.server.router": lambda process, bind: (Port(process, None), bind),
            "roundtable.ps.server.server.dealer": port,
            "roundtable.ps.server.connections.dealer": port,
            "roundtable.worker.client.connections.dealer": port,
            "roundtable.worker.client.unreached.Reachability": mock.Mock(
                return_value=mock.Mock(unreached=lambda now, patience_s: {})
            ),
            "roundtable.worker.client.io_thread.restart": _restart,
            "roundtable.worker.client.io_thread.socket": SimpleNamespace(socketpair=lambda: (null, null)),
            "roundtable.worker.client.io_thread.threading": SimpleNamespace(Condition=threading.Condition, Thread=mock.Mock()),
            "roundtable.worker.client.connections.zmq": SimpleNamespace(
                Context=lambda: world.starting, Poller=mock.Mock, POLLIN=zmq.POLLIN
            ),
            "roundtable.ps.server.connections.zmq": SimpleNamespace(Poller=mock.Mock, POLLIN=zmq.POLLIN),
            "roundtable.ps.replication.state_transfer.CREDIT_BYTES": 2 * world.case.chunk_bytes,
            "roundtable.ps.coordinator.model_collection.CREDIT_BYTES": 2 * world.case.chunk_bytes,
            "roundtable.ps.coordinator.results._HASH_BYTES": 64,
        }
        for name, value in replacements.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(mock.patch.object(Contributor, "give_up", world.count_given_up(Contributor.give_up)))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        stack.callback(world.end_scripts)
        yield


def simulate(case: Case, until_checkpoint: bool = False) -> Outcome:
    """Run a case to its end, or until its first checkpoint is complete. Return the outcome.

    Raises AssertionError if the run hangs or breaks a promise.
    """
    world = World(case)
    threads = torch.get_num_threads()
    with _stand_ins(world), TemporaryDirectory() as folder:
        coordinator = CoordinatorProcess(world, "coordinator", case.folder or Path(folder))
        world.start(coordinator)
        servers = [ServerProcess(world, f"server-{n}") for n in range(case.settings.servers)]
        workers = [WorkerProcess(world, f"worker-{n}", p) for n, p in enumerate(case.paces)]
        for server in servers:
            world.start(server)
        for number, at, away in case.replaced:
            world.at(100.0 + at, lambda n=number, away=away: _newest_of(world, n).kill_once_copied(away))  # type: ignore[misc]
        for name, at, away in case.killed:
            world.at(100.0 + at, lambda name=name, away=away: _kill(world, name, away))  # type: ignore[misc]
        for name, at, away in case.told:
            world.at(100.0 + at, lambda name=name, away=away: _tell(world, name, away))  # type: ignore[misc]
        for at, away in case.stopped:
            world.at(100.0 + at, lambda away=away: coordinator.stop(away))  # type: ignore[misc]
        for worker in workers:
            world.at(100.0 + worker.pace.starts_s, lambda w=worker: world.start(w))  # type: ignore[misc]
        planned = sum(load(case.settings).updates(segment) for segment in case.plans())

        def over() -> bool:
            if until_checkpoint and coordinator.coordinator.checkpoints.scheduler.newest >= 0:
                return True
            everybody = [process for process in world.processes.values() if isinstance(process, WorkerProcess)]
            there = world.expected <= world.processes.keys()
            done = there and all(w.done or not w.useful for w in everybody)
            if coordinator.ledger.ends_after >= 0 and coordinator.alive and coordinator.coordinator.is_finished():
                return True  # processes that come later have nothing left to do
            return (
                done
                and _is_settled(world)
                and coordinator.ledger.committed >= (planned if coordinator.ledger.ends_after < 0 else coordinator.ledger.planned)
                and coordinator.coordinator.model.is_complete
            )

        try:
            world.run(over)
            world.over = True
            world.run(lambda: False, world.now + 8.0)  # time for late messages, for messages sent again, and for reports
            coordinator.finish()
        finally:
            torch.set_num_threads(threads)
        workers = [process for process in world.processes.values() if isinstance(process, WorkerProcess)]
        unsent: dict[str, torch.Tensor] = {}
        for worker in workers:
            for name, start, values in worker.residuals() if not until_checkpoint else ():
                whole = unsent.setdefault(name, torch.zeros(len(Model(case).get_parameter(name).view(-1))))
                whole[start : start + len(values)] += values
        models = {w.key: state(w.model) for w in workers if w.done and w.useful}
        hosts = [_last_host(world, number) for number in range(len(servers))]
        outcome = Outcome(case, world, models, coordinator.ledger, coordinator.log, hosts, unsent)
        if not until_checkpoint:
            _check_file(outcome, coordinator.folder / MODEL_FILE)
        return outcome


def _check_file(outcome: Outcome, path: Path) -> None:
    """Assert that the model's file has the servers' final weights."""
    file, layout = load_file(path), outcome.shards[0].model.layout
    assert file.keys() == Model(outcome.case).state_dict().keys()
    for chunk in layout.chunks:
        store = outcome.shards[chunk.server].model.dense
        for piece in chunk.pieces:
            spec = layout.tensors[piece.tensor]
            flat = file[spec.name].reshape(-1)
            flat = flat.view(torch.uint8) if spec.is_bytes else flat
            assert torch.equal(
                flat[piece.start : piece.start + piece.length], store.master(chunk.id)[piece.offset : piece.offset + piece.length]
            )
    if outcome.case.rows:
        assert torch.equal(file["table.weight"], outcome.table())
    if outcome.case.classes:
        assert torch.equal(file["head.weight"], outcome.head())


def _newest_of(world: World, number: int) -> ServerProcess:
    """Return the newest process in the place of server `number`. It may be gone."""
    newest = world.newest(f"server-{number}")
    assert isinstance(newest, ServerProcess)
    return newest


def _last_host(world: World, number: int) -> ShardHost:
    """Return the state machine of the last process that had the shard of server `number`.

    A server that dies after the model has been written may not be replaced.
    """
    place = f"server-{number}"
    those = [p.host for p in world.processes.values() if p.place == place and isinstance(p, ServerProcess) and p.server._shard]
    return next((host for host in reversed(those) if host.shard is not None and not host.restoring), those[-1])


def _is_settled(world: World) -> bool:
    """Return True if the coordinator and all servers are in one run and no more checkpoint will come."""
    process: Any = world.processes["coordinator"]
    coordinator: Coordinator = process.coordinator
    if process.alive and coordinator.context.membership.lost_servers and coordinator.is_finished():
        return True  # once the model is written, the run ends without servers that have died since
    servers = [_newest_of(world, number) for number in range(world.case.settings.servers)]
    are_there = process.alive and all(s.alive and s.server._stamp.run == coordinator.context.head.run for s in servers)
    restarts = (
        process.leaves
        or coordinator.stopping.signal
        or coordinator.context.membership.broken
        or coordinator.context.membership.lost_servers
    )
    is_saved = coordinator.checkpoints.scheduler.has_ended(coordinator.context.ledger.committed)
    return are_there and not restarts and is_saved


def _tell(world: World, name: str, away: float) -> None:
    """Tell the newest process in the place `name` to stop, if it is alive."""
    process = world.newest(name)
    if process is not None and process.alive and not world.over:
        process.tell(away)


def _kill(world: World, name: str, away: float) -> None:
    """Kill the newest process in the place `name`, if it is alive."""
    process = world.newest(name)
    if process is not None and process.alive and not world.over:
        process.kill(away)
