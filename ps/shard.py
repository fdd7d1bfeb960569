"""What a server decides: which contributions count, when they are applied, and who gets which weights.

State machines without a socket, a thread or a clock: `handle(sender, message, frames, now)` and `tick(now)` return what to
send. `RoundShard` applies once per round, `PushShard` each push at once; here is what they share. The numbers are the
store's. Invariants, which the tests check over random schedules:

- a micro-batch of a round counts at most once in each chunk, whatever is sent again, late or by whom;
- weights handed out for a round hold every update before it, and nothing of later ones (`RoundShard`);
- a worker starts a round only as far ahead as the policy admits (`PushShard`).
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from common.errors import WireError
from common.layout import Chunk, Layout, make_layout, message_batches
from common.messages import (
    Body,
    Committed,
    Contribution,
    Init,
    Plan,
    Pull,
    Push,
    Ready,
    Refused,
    Report,
    ReportAck,
    RowInit,
    RowPull,
    RowPush,
    Rows,
    Setup,
    Share,
    Shared,
    Weights,
)  # fmt: skip
from common.plan import Round, Segment
from common.policies import Policy
from common.rows import RowSums
from common.settings import Settings
from common.shared import NotShared, Region, attach
from common.slots import memory_of, views
from common.sums import Sum
from common.tensors import to_frame
from common.tree import is_node
from common.wire import ASK_AGAIN_S, Frames
from ps.planes import Planes, Readers
from ps.rows import RowTables
from ps.store import Store

log = logging.getLogger("ps.shard")

COORDINATOR = "coordinator"
#: Seconds between two reports to the coordinator while there is news.
REPORT_S = 0.2
#: Id under which server 0 files the metrics of a contribution, beside its chunks.
METRICS = -1
#: Id under which a server files what a contribution has for its rows of all tables, where there are any.
ROWS = -2

Metrics = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Send:
    """Effect: send `body` and `frames` to the process called `to`."""

    to: str
    body: Body
    frames: Frames = ()


def add_metrics(left: Metrics, right: Metrics) -> Metrics:
    """Sums by name; names only one side has are kept."""
    out = dict(left)
    for name, (total, samples) in right.items():
        before = out.get(name, (0.0, 0.0))
        out[name] = (before[0] + total, before[1] + samples)
    return out


def mean_metrics(total: Metrics) -> dict[str, float]:
    return {name: value / samples for name, (value, samples) in total.items() if samples}


class Shard(ABC):
    """What both kinds of server do: setting up, plans, first weights, answering pulls, reporting."""

    def __init__(self, index: int, settings: Settings, policy: Policy) -> None:
        self.index = index
        self.settings = settings
        self.policy = policy
        self.layout: Layout | None = None
        self.chunks: dict[int, Chunk] = {}
        self.store: Store | None = None
        self.tables: RowTables | None = None
        #: Memory that weights are laid out in, and who may be reading which plane of it.
        self.planes: Planes | None = None
        self.readers = Readers()
        #: Workers' regions that can be read here, and the chunks in each of their slots.
        self._regions: dict[str, Region] = {}
        self._slots: dict[tuple[str, int], dict[int, torch.Tensor]] = {}
        self.segments: list[Segment] = []
        #: The Setup that defined the model, and who sent it.
        self._setup: tuple[Setup, str] | None = None
        #: Chunks, and pages of tables, whose first weights are still to come.
        self._uninitialised: set[int | tuple[int, int]] = set()
        #: Who waits for which round's weights, and which chunks of them were not sent yet.
        self.waiters: dict[str, tuple[Pull, set[int]]] = {}
        #: The number of each worker's newest pull.
        self._asked_for: dict[str, int] = {}
        self._news: list[Contribution] = []
        self._rounds: list[Committed] = []
        self._report: Report | None = None
        self._report_at = 0.0
        self._reported_version = -1

    # ---- what differs

    @property
    @abstractmethod
    def _plane_count(self) -> int:
        """How many planes there are to be."""

    @property
    @abstractmethod
    def version(self) -> int:
        """Every round below is applied."""

    @abstractmethod
    def missing(self) -> list[int]:
        """Micro-batches of round `version` that are not all in here: what the coordinator may lease again."""

    @abstractmethod
    def _opened(self) -> None:
        """The first weights are complete."""

    @abstractmethod
    def _push(self, sender: str, push: Push, frames: Frames, now: float) -> list[Send]: ...

    @abstractmethod
    def _push_rows(self, sender: str, push: RowPush, frames: Frames, now: float) -> list[Send]: ...

    @abstractmethod
    def _serve(self, worker: str) -> list[Send]:
        """Send a waiting worker what there is for it."""

    def _from_coordinator(self, body: Body, now: float) -> list[Send]:
        raise WireError(f"a server has no use for {type(body).__name__}")

    # ---- events

    def handle(self, sender: str, body: Body, frames: Frames, now: float) -> list[Send]:
        """One message. Raises WireError if it cannot be meant; then nothing has changed."""
        match body:
            case Push():
                return self._push(sender, body, frames, now)
            case Pull():
                return self._pull(sender, body)
            case RowPush():
                return self._push_rows(sender, body, frames, now)
            case RowPull():
                return self._pull_rows(sender, body, frames)
            case RowInit():
                return self._init_rows(sender, body, frames)
            case Setup():
                return self._set_up(sender, body)
            case Plan():
                return self._plan(sender, body.segment)
            case Init():
                return self._init(sender, body, frames)
            case Share():
                return self._share(sender, body)
            case ReportAck():
                self._acknowledged(body.seq)
                return []
            case _:
                if sender != COORDINATOR:
                    raise WireError(f"a server has no use for {type(body).__name__}")
                return self._from_coordinator(body, now)

    def tick(self, now: float) -> list[Send]:
        """What is due: the report, and questions that were not answered."""
        if self._report is not None:
            due = now >= self._report_at + ASK_AGAIN_S
        else:
            news = self._news or self._rounds or self.version != self._reported_version
            due = bool(news) and now >= self._report_at + REPORT_S
            if due:
                seq = int(now * 1e6)
                self._report = Report(seq, self.version, self._rounds, self._news)
                self._rounds, self._news = [], []
        if not due or self._report is None:
            return []
        self._report_at = now
        return [Send(COORDINATOR, self._report)]

    def _acknowledged(self, seq: int) -> None:
        if self._report is not None and self._report.seq == seq:
            self._reported_version = self._report.version
            self._report = None

    # ---- setting up

    def _set_up(self, sender: str, setup: Setup) -> list[Send]:
        if self._setup is None:
            layout = make_layout(setup.tensors, self.settings.servers, setup.tables)
            self.store = Store(layout, self.index, setup.update, self.policy)
            keeps = self.policy.applies == "round"
            self.tables = RowTables(layout, self.index, setup.update, self.settings.seed, keeps)
            self.layout = layout
            self.chunks = {chunk.id: chunk for chunk in layout.on(self.index)}
            self._uninitialised = {*self.chunks, *self.tables.awaited()}
            self.planes = Planes(layout.on(self.index), self._plane_count, shared=self.settings.lane == "auto")
            if self.planes.refused:
                log.warning("%s Workers get their weights through sockets.", self.planes.refused)
            self._setup = setup, sender
            if not self._uninitialised:
                self._opened()
        elif setup != self._setup[0]:
            return [Send(sender, Refused("Setup", _difference(*self._setup, setup, sender)))]
        return [Send(sender, Ready("Setup"))]

    def _plan(self, sender: str, segment: Segment) -> list[Send]:
        if segment.index == len(self.segments):
            self.segments.append(segment)
        elif segment.index > len(self.segments) or self.segments[segment.index] != segment:
            reason = (
                f"{sender} asks for other batches than the workers before it ({segment.samples} samples, global batch "
                f"{segment.global_batch}, micro-batch {segment.micro_batch}, {segment.epochs} epochs): every worker must run "
                "the same script on the same data."
            )
            return [Send(sender, Refused("Plan", reason))]
        return [Send(sender, Ready("Plan", segment.index))]

    def _init(self, sender: str, init: Init, frames: Frames) -> list[Send]:
        if self.store is None or len(frames) != len(init.chunks) or not set(init.chunks) <= set(self.chunks):
            raise WireError(f"first weights from {sender} do not fit the model agreed on")
        effects = [Send(sender, Ready("Init", init.chunks[0] if init.chunks else 0))]
        for chunk, frame in zip(init.chunks, frames, strict=True):
            if chunk in self._uninitialised:
                self.store.load(chunk, frame)
                self._uninitialised.discard(chunk)
                if not self._uninitialised:
                    self._opened()
                    effects += self._serve_all()
        return effects

    def _init_rows(self, sender: str, init: RowInit, frames: Frames) -> list[Send]:
        effects = [Send(sender, Ready("RowInit", init.id))]
        key = init.table, init.page
        if self.tables is None or key not in self.tables.awaited():
            raise WireError(f"first rows from {sender} do not fit the model agreed on")
        if key in self._uninitialised:
            self.tables.load(init.table, init.page, frames)
            self._uninitialised.discard(key)
            if not self._uninitialised:
                self._opened()
                effects += self._serve_all()
        return effects

    def _share(self, sender: str, share: Share) -> list[Send]:
        """See whether there is memory that this worker and this server both reach."""
        if self.planes is None:
            raise WireError(f"{sender} offers memory before the model is agreed on")
        self._slots = {key: views for key, views in self._slots.items() if key[0] != sender}
        if sender in self._regions:
            self._regions.pop(sender).close()
        if share.gradients is not None and self.settings.lane == "auto":
            try:
                self._regions[sender] = attach(share.gradients)
            except NotShared as error:
                log.info("%s sends its gradients: %s", sender, error)
        return [Send(sender, Shared(sender in self._regions, self.planes.handle))]

    @property
    def _open(self) -> bool:
        return self._setup is not None and not self._uninitialised

    def round_plan(self, index: int) -> Round:
        """Raises WireError for a round no plan knows."""
        for segment in reversed(self.segments):
            if segment.first_round <= index < segment.end:
                return segment.round(index)
        raise WireError(f"no plan knows round {index}")

    def _check(self, sender: str, push: Push, frames: Frames, count: int, samples: int | None) -> list[Sum]:
        """The push's tensors. Raises WireError unless all of it fits the layout and the plan."""
        if self.store is None or not self._open:
            raise WireError(f"{sender} pushed before the first weights were set")
        count_of_frames = len(push.chunks) if push.slot < 0 else 0
        if len(push.chunks) != len(push.present) or len(frames) != count_of_frames or not set(push.chunks) <= set(self.chunks):
            raise WireError(f"a push of {sender} names chunks {push.chunks} with {len(frames)} frames")
        if not push.scale > 0 or math.frexp(push.scale)[0] != 0.5:
            raise WireError(f"a push of {sender} is to be multiplied by {push.scale}, which is no power of two")
        if not is_node((push.lo, push.hi), count):
            raise WireError(f"a push of {sender} is for micro-batches {push.lo}..{push.hi - 1} of {count}")
        if push.samples < 0 or (samples is not None and push.samples != samples):
            raise WireError(f"a push of {sender} counts {push.samples} samples where the plan has {samples}")
        if push.slot >= 0:
            slot = self._slot(sender, push.slot)
            return [self.store.view(i, slot[i], bits, push.scale) for i, bits in zip(push.chunks, push.present, strict=True)]
        parts = zip(push.chunks, frames, push.present, strict=True)
        return [self.store.receive(chunk, frame, present, push.scale) for chunk, frame, present in parts]

    def _check_rows(self, sender: str, push: RowPush, frames: Frames, plan: Round) -> RowSums:
        """The push's rows. Raises WireError unless all of it fits the tables and the plan."""
        if self.tables is None or not self._open:
            raise WireError(f"{sender} pushed before the first weights were set")
        if not is_node((push.lo, push.hi), plan.micro_batches) or push.samples != plan.samples_in(push.lo, push.hi):
            raise WireError(f"rows from {sender} are for micro-batches {push.lo}..{push.hi - 1} of {plan.micro_batches}")
        return self.tables.receive(push, frames, f"a push of {sender}")

    def _slot(self, sender: str, slot: int) -> dict[int, torch.Tensor]:
        if (sender, slot) not in self._slots:
            region = self._regions.get(sender)
            if region is None or self.layout is None:
                raise WireError(f"{sender} has shared no memory with this server")
            try:
                self._slots[sender, slot] = views(self.layout, memory_of(self.layout, region, slot))
            except IndexError as error:
                raise WireError(f"a push of {sender}: {error}") from None
        return self._slots[sender, slot]

    # ---- weights

    @property
    def _ids(self) -> list[int]:
        """All that a contribution consists of here."""
        return [*([METRICS] if self.index == 0 else []), *([ROWS] if self.tables else []), *self.chunks]

    def _last(self, metrics: dict[str, float]) -> dict[str, float] | None:
        """What the last of the weights go with, from servers without whose word a worker must not go on."""
        return metrics if self.index == 0 or self.tables else None

    def _pull_rows(self, sender: str, pull: RowPull, frames: Frames) -> list[Send]:
        found = self.tables.read(pull, frames) if self.tables is not None and self._open else None
        return [] if found is None else [Send(sender, Rows(pull.number, found[0]), found[1])]

    def _pull(self, sender: str, pull: Pull) -> list[Send]:
        if pull.number < self._asked_for.get(sender, 0):
            return []  # it was under way for long, and its sender has gone on since
        self._asked_for[sender] = pull.number
        self.waiters[sender] = pull, set(self.chunks) - set(pull.have)
        self.readers.asks(sender, pull.plane)
        return self._serve(sender)

    def _serve_all(self) -> list[Send]:
        return [effect for worker in list(self.waiters) for effect in self._serve(worker)]

    def _weights(
        self,
        to: str,
        pull: Pull,
        version: int,
        plane: int,
        weights: Mapping[int, torch.Tensor],
        metrics: dict[str, float] | None,
    ) -> list[Send]:
        """Where to read the weights of some chunks, or if they are not shared, messages of up to a chunk's size each.

        The metrics go with the last."""
        if plane >= 0:
            self.readers.sent(to, plane)  # frames, too, are sent from where the weights are
        if pull.shared and plane >= 0:
            return [Send(to, Weights(pull.clock, version, sorted(weights), metrics, plane))]
        batches = message_batches(sorted(weights), lambda i: self.chunks[i].weight_bytes)
        if not batches and metrics is not None:
            batches = [[]]
        return [
            Send(
                to,
                Weights(pull.clock, version, ids, metrics if ids is batches[-1] else None),
                [to_frame(weights[i]) for i in ids],
            )
            for ids in batches
        ]


def contribution(
    sender: str, push: Push, outcome: Literal["committed", "duplicate", "dropped"], staleness: int | None = None
) -> Contribution:
    """The ledger's row for a push."""
    return Contribution(push.round, push.lo, push.hi, sender, push.samples, push.micro_batches, outcome, staleness)


def _difference(known: Setup, owner: str, other: Setup, sender: str) -> str:
    """One sentence on how two workers' models differ."""
    for a, b in zip(known.tensors, other.tensors, strict=False):
        if a != b:
            return (
                f"{sender}'s model is not {owner}'s: {b.name} is {b.dtype} {b.shape} (group {b.group}) where {owner} has "
                f"{a.name}, {a.dtype} {a.shape} (group {a.group}); every worker must build the same model."
            )
    if len(known.tensors) != len(other.tensors):
        return f"{sender}'s model has {len(other.tensors)} parameters and buffers where {owner}'s has {len(known.tensors)}."
    if known.tables != other.tables:
        return f"{sender}'s row-sparse tables are not {owner}'s: {other.tables} instead of {known.tables}."
    return f"{sender} asks for another optimizer than {owner}: {other.update} instead of {known.update}."
