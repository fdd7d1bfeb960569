"""What a server decides: which contributions count, when they are applied, and who gets which weights.

State machines without a socket, a thread or a clock: `handle(sender, message, frames, now)` and `tick(now)` return what to
send. `SyncShard` applies once per round, `AsyncShard` each push at once; here is what they share. The numbers are the
store's. Invariants, which the tests check over random schedules:

- a micro-batch of a round counts at most once in each chunk, whatever is sent again, late or by whom;
- weights handed out for a round hold every update before it, and nothing of later ones (`SyncShard`);
- a worker starts a round only as far ahead as the policy admits (`AsyncShard`).
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec
import torch

from roundtable.common.codecs.registry import push_seed
from roundtable.common.config.batch_plan import Round, Segment
from roundtable.common.config.settings import Settings
from roundtable.common.model.gradient_buffer_layout import memory_of, views
from roundtable.common.model.layout import Chunk, Layout, make_layout, message_batches, urgency
from roundtable.common.model.partial_sum import Sum
from roundtable.common.model.reduction_tree import is_node
from roundtable.common.model.sparse_rows import RowSums, cut
from roundtable.common.model.tensor_bytes import to_frame
from roundtable.common.policies import Policy
from roundtable.common.protocol.effects import COORDINATOR, AboutCopies, Send
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.commit import Committed, Contribution, Report, ReportAck
from roundtable.common.protocol.messages.embedding import InitialRows, RowPull, RowPush, Rows
from roundtable.common.protocol.messages.gradients import Ack, Pull, Push, Weights, WeightsCredit
from roundtable.common.protocol.messages.saving import CheckpointStatus, ModelPart, SendModel, TakeCheckpoint
from roundtable.common.protocol.messages.session import MembersLost, Refused, Traffic
from roundtable.common.protocol.messages.setup import (
    Accepted,
    InitialWeights,
    OfferSharedMemory,
    Plan,
    PlanReply,
    Request,
    Setup,
    SetupReply,
    SharedMemoryReply,
)
from roundtable.common.protocol.messages.sharded import LayerPush, ShardedForward
from roundtable.common.protocol.shared_memory import NotShared, Region, attach
from roundtable.common.protocol.transport import ASK_AGAIN_S, Frames, bytes_of
from roundtable.common.runtime.errors import UsageError, WireError
from roundtable.common.runtime.failpoints import failpoint
from roundtable.ps import differences
from roundtable.ps.model_parts import Part, parts_on
from roundtable.ps.params.dense import DenseParameters
from roundtable.ps.params.embedding import RowTables
from roundtable.ps.params.weight_buffers import Readers, WeightBuffers
from roundtable.ps.server.checkpoint_writer import CheckpointData, Source
from roundtable.ps.server.memory_budget import check_memory
from roundtable.ps.sharded.layers import Contributed, LayerShards
from roundtable.ps.validation import check_distinct, check_hypers, check_setup

log = logging.getLogger("roundtable.ps.shard")

#: Seconds between two reports to the coordinator while there is news.
REPORT_S = 0.2
#: Contributions of one worker of which parts that came early are kept.
_EARLY = 2
#: Rounds for which it is known whose contributions counted, for workers that have not got word of it.
_REMEMBERED = 64
#: Id under which server 0 files the metrics of a contribution, beside its chunks.
METRICS = -1
#: Id under which a server files what a contribution has for its rows of all tables, where there are any.
ROWS = -2
#: Id under which a server files what a contribution has for classifiers, where there are any.
CLASSES = -3

#: Bytes of weights that may be on their way to a worker, so that what is needed sooner does not wait for long behind others.
CREDIT_BYTES = 8 << 20

Metrics = dict[str, tuple[float, float]]


@dataclass
class _Early:
    """Of a contribution that a worker is making: what has come of it, by chunk, and the chunks that count."""

    values: dict[int, Sum] = field(default_factory=dict)
    confirmed: set[int] = field(default_factory=set)


@dataclass
class WaitingWorker:
    """One who waits for weights: the chunks that were not sent yet, all that it is known to need, whether it was told that the
    round before is closed, and the bytes that are on their way to it, by chunk."""

    pull: Pull
    unsent: set[int] = field(default_factory=set)
    needed: set[int] = field(default_factory=set)
    closed: bool = False
    bytes_under_way: dict[int, int] = field(default_factory=dict)
    #: Where each push is applied at once: the weights as they were when it was its turn, and the frames that some are sent in.
    weights: Mapping[int, torch.Tensor] | None = None
    coded: Mapping[int, memoryview] = field(default_factory=dict)
    version: int = -1


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

    def __init__(self, index: int, settings: Settings, policy: Policy, source: Source | None = None) -> None:
        """`source` is the snapshot to go on from, if any."""
        self.index = index
        self.settings = settings
        self.policy = policy
        self.layout: Layout | None = None
        self.chunks: dict[int, Chunk] = {}
        self.store: DenseParameters | None = None
        self.tables: RowTables | None = None
        self.classifiers: LayerShards | None = None
        #: Where classifiers are.
        self.device = torch.device("cpu")
        #: Memory that weights are laid out in, and who may be reading which plane of it.
        self.planes: WeightBuffers | None = None
        self.readers = Readers()
        #: Workers' regions that can be read here, and the chunks in each of their slots.
        self._regions: dict[str, Region] = {}
        self._slots: dict[tuple[str, int], dict[int, torch.Tensor]] = {}
        #: What workers have sent early, by worker and (round, lo, hi).
        self._early: dict[str, dict[tuple[int, int, int], _Early]] = {}
        #: By round and (worker, lo, hi): the chunks in which that worker's contribution counted when it came.
        self._counted: dict[int, dict[tuple[str, int, int], set[int]]] = {}
        self.segments: list[Segment] = []
        #: The Setup that defined the model, and who sent it.
        self._setup: tuple[Setup, str] | None = None
        #: Chunks, and pages of tables, whose first weights are still to come.
        self._uninitialised: set[int | tuple[int, int]] = set()
        #: Frozen chunks; and from which version on those are in the same planes as others that something was contributed to.
        self._frozen: set[int] = set()
        self._moved_at: dict[int, int] = {}
        self.waiters: dict[str, WaitingWorker] = {}
        #: The number of each worker's newest pull.
        self._asked_for: dict[str, int] = {}
        #: Workers that are lost: nothing of theirs counts any more.
        self.lost: set[str] = set()
        self._news: list[Contribution] = []
        self._rounds: list[Committed] = []
        self._dropped: list[Contribution] = []
        self._report: Report | None = None
        self._report_at = 0.0
        self._reported_version = -1
        self._source = source
        #: Whether the shard is still to come from the server that keeps a copy of it: nobody is answered before.
        self.restoring = False
        #: Whether what is reported may have been reported by the process in whose place this one is.
        self._repeats = False
        #: The snapshot to be made, and what has become of it; and its contents until somebody takes them to be written.
        self._cut: TakeCheckpoint | None = None
        self._saved: CheckpointStatus | None = None
        self.capture: CheckpointData | None = None
        #: A capture that still lacks the classifiers, which get there later than all else, and the version that they are to be.
        self._held: CheckpointData | None = None
        self._held_version = 0
        #: Whether what was captured is being written.
        self.is_writing: Callable[[], bool] = lambda: False
        #: How much of snapshots was written so far, a number that grows.
        self.bytes_saved: Callable[[], int] = lambda: 0
        #: Called in the middle of what takes long; and how much of a snapshot was read so far, in parts.
        self.breathe: Callable[[], None] = lambda: None
        self._parts_done = 0
        #: Called before tables change: what `capture` has of them must be written by then.
        self.before_tables_change: Callable[[], None] = lambda: None
        #: The incarnation of the coordinator whose word counts.
        self.coordinator = 0
        #: The parts of the trained model that are here, and the numbers of those that the coordinator wants of which round.
        self._parts: list[Part] = []
        self._wanted: tuple[int, set[int]] = -1, set()

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

    def missing_later(self) -> list[list[int]]:
        """Likewise of the rounds after it, one by one, as far as workers have got to; some of the first, where those are many.
        None where one round is open at a time."""
        return []

    @abstractmethod
    def _opened(self) -> None:
        """The first weights are complete."""

    @abstractmethod
    def _push(self, sender: str, push: Push, frames: Frames, now: float, values: Sequence[Sum] | None = None) -> list[Send]:
        """A contribution, in `frames`, or in `values` if those came early."""

    @abstractmethod
    def _push_rows(self, sender: str, push: RowPush, frames: Frames, now: float) -> list[Send]: ...

    @abstractmethod
    def _push_classes(self, sender: str, push: LayerPush, frames: Frames, now: float) -> list[Send]: ...

    @abstractmethod
    def _serve(self, worker: str) -> list[Send]:
        """Send a waiting worker what there is for it."""

    @property
    @abstractmethod
    def _at_border(self) -> bool:
        """Whether the weights are those of `version`, and nothing of later rounds is in them."""

    def _extra(self) -> dict[str, Any]:
        """What a snapshot must hold beside tensors."""
        return {}

    @abstractmethod
    def _resume(self, source: Source) -> None:
        """Be at the round of a snapshot, whose tensors are here."""

    def about_copies(self, sender: str, body: AboutCopies, frames: Frames, now: float) -> list[Send]:
        """A message of the server that keeps a copy of this shard (KEEPER), or of the one whose shard has a copy here."""
        raise WireError(f"{sender} keeps or has no copy here")

    def changed(self, keeper: bool, kept: bool, now: float) -> list[Send]:
        """The keeper of the copy of this shard is another process, or the one whose shard has a copy here."""
        return []

    @property
    def keeps(self) -> list[int]:
        """Servers of whose shards there is a whole copy here."""
        return []

    def _from_coordinator(self, body: Body, now: float) -> list[Send]:
        if isinstance(body, TakeCheckpoint):
            return self._asked_to_cut(body)
        if isinstance(body, SendModel):
            known = self._wanted[1] if self._wanted[0] == body.round else set()
            self._wanted = body.round, known.union(body.parts)
            return self._hand_in()
        raise WireError(f"a server has no use for {type(body).__name__}")

    # ---- events

    def handle(self, sender: str, body: Body, frames: Frames, now: float) -> list[Send]:
        """One message. Raises WireError if it cannot be meant; then nothing has changed."""
        match body:
            case Push(stage="tentative"):
                return self._keep(sender, body, frames, now)
            case Push(stage="commit"):
                return self._confirm(sender, body, now)
            case Push():
                return self._push(sender, body, frames, now)
            case Pull():
                return self._pull(sender, body)
            case WeightsCredit():
                return self._got(sender, body)
            case RowPush():
                return self._push_rows(sender, body, frames, now)
            case RowPull():
                return self._pull_rows(sender, body, frames)
            case LayerPush():
                return self._push_classes(sender, body, frames, now)
            case ShardedForward():
                answer = self.classifiers.ask(sender, body, frames) if self.classifiers is not None and self._open else None
                return [] if answer is None else [Send(sender, *answer)]
            case InitialRows():
                return self._init_rows(sender, body, frames)
            case Setup():
                return self._set_up(sender, body)
            case Plan():
                return self._plan(sender, body.segment)
            case InitialWeights():
                return self._init(sender, body, frames)
            case OfferSharedMemory():
                return self._share(sender, body)
            case ReportAck() if sender == COORDINATOR:
                self._acknowledged(body.seq)
                return []
            case MembersLost() if sender == COORDINATOR:
                for worker in set(body.workers) - self.lost:
                    self.lost.add(worker)
                    self._forget(worker)
                return []
            case _:
                if sender != COORDINATOR:
                    raise WireError(f"a server has no use for {type(body).__name__}")
                return self._from_coordinator(body, now)

    def _forget(self, worker: str) -> None:
        """Let go of what is kept for a worker that is lost. What it has handed in counts, wherever it lies."""
        self._early.pop(worker, None)
        self.waiters.pop(worker, None)
        self._asked_for.pop(worker, None)
        self.readers.forget(worker)
        if self.classifiers is not None:
            self.classifiers.forget(worker)
        self._drop_region(worker)

    def _drop_region(self, worker: str) -> None:
        self._slots = {key: views for key, views in self._slots.items() if key[0] != worker}
        if worker in self._regions:
            self._regions.pop(worker).close()

    def tick(self, now: float) -> list[Send]:
        """What is due: the report, and questions that were not answered."""
        if self._report is not None:
            due = now >= self._report_at + ASK_AGAIN_S
        else:
            news = self._news or self._rounds or self.version != self._reported_version
            due = bool(news) and now >= self._report_at + REPORT_S
            if due:
                seq = int(now * 1e6)
                self._report = Report(seq, self.version, self._rounds, self._news, self._repeats, self._dropped)
                self._rounds, self._news, self._repeats, self._dropped = [], [], False, []
        if not due or self._report is None:
            return []
        self._report_at = now
        return [Send(COORDINATOR, self._report)]

    @property
    def busy(self) -> bool:
        """Whether `work` has something to do."""
        return self.classifiers is not None and self._open and self.classifiers.busy

    @property
    def done(self) -> int:
        """A number that grows while what takes long goes on: answers and updates of classifiers, reading, and writing."""
        return self.bytes_saved() + self._parts_done + (self.classifiers.steps if self.classifiers is not None else 0)

    def work(self, now: float) -> list[Send]:
        """Do a little of what takes long."""
        done = self.classifiers.work() if self.classifiers is not None and self._open else None
        self._complete_cut()
        return [*([] if done is None else [Send(done[0], *done[1])]), *self._hand_in()]

    def _acknowledged(self, seq: int) -> None:
        if self._report is not None and self._report.seq == seq:
            self._reported_version = self._report.version
            self._report = None

    def _keep(self, sender: str, push: Push, frames: Frames, now: float) -> list[Send]:
        """Keep what was sent early until it is confirmed, or its sender is at other contributions."""
        self._check_early(sender, push)
        values = self._check(sender, push, frames, self.round_plan(push.round))
        early = self._early_of(sender, push)
        early.values.update(zip(push.chunks, values, strict=True))
        ack = Send(sender, Ack(push.round, push.lo, push.hi, push.chunks, tentative=True))
        return [ack, *(self._confirm(sender, push, now) if early.confirmed.issuperset(push.chunks) else ())]

    def _confirm(self, sender: str, push: Push, now: float) -> list[Send]:
        """What was sent early counts: at once, or as soon as it is here."""
        self._check_early(sender, push)
        early = self._early_of(sender, push)
        early.confirmed.update(push.chunks)
        if not set(push.chunks) <= set(early.values):
            return []
        return self._push(sender, push, (), now, [early.values.pop(chunk) for chunk in push.chunks])

    def _check_early(self, sender: str, push: Push) -> None:
        """Raise WireError for what cannot be sent early."""
        check_distinct(push.chunks, self.chunks, f"a push of {sender}")
        if push.gradient_buffer >= 0 or push.metrics is not None or self.policy.is_local:
            raise WireError(f"{sender} sends early what cannot be sent so")
        self.round_plan(push.round)

    def _early_of(self, sender: str, push: Push) -> _Early:
        held = self._early.setdefault(sender, {})
        if push.key not in held:
            for old in list(held)[: 1 - _EARLY]:
                del held[old]
            held[push.key] = _Early()
        return held[push.key]

    def _counts(self, sender: str, push: Push, chunk: int) -> None:
        """Remember that `push` counts in `chunk`."""
        if push.round not in self._counted:
            for old in [round_ for round_ in self._counted if round_ < push.round - _REMEMBERED]:
                del self._counted[old]
        self._counted.setdefault(push.round, {}).setdefault((sender, push.lo, push.hi), set()).add(chunk)

    def _ack(self, sender: str, push: Push) -> Send:
        """What became of `push`, or of an earlier copy of it."""
        counted = self._counted.get(push.round, {}).get((sender, push.lo, push.hi), set())
        ignored = [chunk for chunk in push.chunks if chunk not in counted]
        return Send(sender, Ack(push.round, push.lo, push.hi, push.chunks, push.metrics is not None, ignored=ignored))

    # ---- snapshots

    def _asked_to_cut(self, cut: TakeCheckpoint) -> list[Send]:
        if self._saved is None or self._saved.round != cut.round:
            self._cut, self._saved = cut, CheckpointStatus(cut.round, "waits")
            self._try_cut()
        if cut.reached and self._held is not None and self.classifiers is not None:
            self.classifiers.begin_update()
        return [Send(COORDINATOR, msgspec.structs.replace(self._saved, done=self.done))]

    def _try_cut(self) -> None:
        """Take hold of what the snapshot is to have, if this is the moment. Called whenever a round is closed."""
        if self._cut is None or self.version < self._cut.round:
            return
        cut, self._cut = self._cut, None
        if self.version > cut.round or not self._at_border or not self._open:
            self._saved = CheckpointStatus(cut.round, "missed")
            return
        assert self.store is not None and self.tables is not None and self.classifiers is not None
        entries = [*self.store.state(self._seen, copies=not cut.final), *self.tables.state()]
        self._held_version = self.classifiers.accepted
        self._held = CheckpointData(cut.round, cut.token, entries, self._extra())
        self._saved = CheckpointStatus(cut.round, "writing")

    def _complete_cut(self) -> None:
        """Hand out what is held as soon as the classifiers have got there as well."""
        held, classifiers = self._held, self.classifiers
        if held is None or classifiers is None:
            return
        if not classifiers or classifiers.version == self._held_version:
            self.capture = replace(held, entries=[*held.entries, *classifiers.state()])
            self._held = None

    def _before_tables_change(self) -> None:
        """What is held must be handed out now. It can be: somebody has contributed to the next round, so all have got there."""
        if self._held is not None and self.classifiers is not None:
            self.classifiers.settle(self._held_version)
            self._complete_cut()
        self.before_tables_change()

    def saved(self, saved: CheckpointStatus) -> list[Send]:
        """`capture` is written, or could not be."""
        if self._saved is None or self._saved.round != saved.round:
            return []
        self._saved = saved
        return [Send(COORDINATOR, saved)]

    @property
    def _seen(self) -> Mapping[int, torch.Tensor]:
        """The weights that workers compute from now, by chunk, where these may not be the master's."""
        return {}

    def _go_on(self, source: Source) -> None:
        """Have the state of a snapshot, on however many servers it was taken."""
        assert self.store is not None and self.tables is not None and self.classifiers is not None
        source.files.on_read = self._did_part
        try:
            self.store.restore(source.files)
            self.tables.restore(source.files, source.servers, source.round)
            self.classifiers.restore(source.files, source.servers, source.round)
        except KeyError as error:
            raise UsageError(f"the snapshot of round {source.round} lacks {error}: it is of another version or layout.") from None
        self._uninitialised.clear()
        self._resume(source)

    def _did_part(self) -> None:
        """A part of something long is done: a piece of a snapshot is read, or a chunk updated."""
        self._parts_done += 1
        self.breathe()

    # ---- the trained model

    def _hand_in(self) -> list[Send]:
        """Send the coordinator the parts of the model that it wants, once all updates before that round are done and no others.
        By then every server has closed the rounds before it."""
        round_, numbers = self._wanted
        if not numbers or round_ != self.version or not self._at_border or not self._open:
            return []
        if self.classifiers:
            self.classifiers.begin_update()
            if self.classifiers.version != self.classifiers.accepted:
                return []
        self._wanted = -1, set()
        failpoint("uploading", round_)
        known = sorted(number for number in numbers if number < len(self._parts))
        return [Send(COORDINATOR, ModelPart(round_, number), self._frames_of(self._parts[number])) for number in known]

    def _frames_of(self, part: Part) -> list[memoryview]:
        """The frames of a part, whose order ps/model_parts.py tells."""
        assert self.store is not None and self.tables is not None and self.classifiers is not None
        if part.kind == "chunk":
            return [to_frame(self.store.master(part.number))]
        if part.kind == "table":
            return cut(self.tables.page(part.number, part.page))
        return [frame for tensor in self.classifiers.page(part.number, part.page) for frame in cut(tensor)]

    # ---- setting up

    def _set_up(self, sender: str, setup: Setup) -> list[Send]:
        setup = msgspec.structs.replace(setup, facts=[])  # which are the coordinator's to compare
        if self._setup is None:
            if self._source is not None and setup != self._source.setup:
                return [Send(sender, Refused("Setup", differences.of_setups(self._source.setup, "the snapshot", setup, sender)))]
            layout, self.store, self.tables, self.classifiers = self._made(setup)
            self.tables.before_update = self._before_tables_change
            self.classifiers.may_update = self._may_update_classifiers
            self.layout = layout
            self.chunks = {chunk.id: chunk for chunk in layout.on(self.index)}
            self._parts = parts_on(layout, self.index)
            self._frozen = {chunk.id for chunk in self.chunks.values() if chunk.frozen}
            self._uninitialised = {*self.chunks, *self._awaited_pages()}
            self.planes = WeightBuffers(layout.on(self.index), self._plane_count, shared=self.settings.transport == "auto")
            if self.planes.refused:
                log.warning("%s Workers get their weights through sockets.", self.planes.refused)
            self._setup = setup, sender
            if self._source is not None:
                self._go_on(self._source)
            if not self._uninitialised and not self.restoring:
                self._opened()
        elif setup != self._setup[0]:
            return [Send(sender, Refused("Setup", differences.of_setups(*self._setup, setup, sender)))]
        return [Send(sender, SetupReply(bool(self._uninitialised)))]

    def _made(self, setup: Setup) -> tuple[Layout, DenseParameters, RowTables, LayerShards]:
        """What holds the numbers of a model. Raises WireError where there can be no such model here."""
        check_setup(setup)
        keeps = self.policy.applies == "round"
        try:
            layout = make_layout(setup.tensors, self.settings.servers, setup.tables, setup.classifiers)
            check_memory(layout, self.index, setup.update, self.device, self.settings.replicas)
            store = DenseParameters(layout, self.index, setup.update, self.policy)
            tables = RowTables(layout, self.index, setup.update, self.settings.seed, keeps)
            return layout, store, tables, LayerShards(layout, self.index, setup.update, self.settings.seed, keeps, self.device)
        except WireError:
            raise
        except Exception as error:  # whatever torch objects to in what it is to make
            text = str(error).strip().splitlines()
            raise WireError(f"the model or its optimizer cannot be made: {text[0] if text else type(error).__name__}") from None

    def _plan(self, sender: str, segment: Segment) -> list[Send]:
        if segment.index == len(self.segments) and segment.follows(self.segments[-1] if self.segments else None):
            self.segments.append(segment)
        elif segment.index >= len(self.segments) or self.segments[segment.index] != segment:
            reason = differences.of_plans(self.segments, "another worker", segment, sender)
            return [Send(sender, Refused("Plan", reason))]
        return [Send(sender, PlanReply(segment.index))]

    def _init(self, sender: str, init: InitialWeights, frames: Frames) -> list[Send]:
        if self.store is None or len(frames) != len(init.chunks):
            raise WireError(f"first weights from {sender} do not fit the model agreed on")
        check_distinct(init.chunks, self.chunks, f"a message of {sender} with first weights")
        for chunk, frame in zip(init.chunks, frames, strict=True):
            if bytes_of(frame).nbytes != self.chunks[chunk].weight_bytes:
                raise WireError(f"first weights from {sender} do not fit chunk {chunk}")
        effects = [Send(sender, Accepted(Request.INITIAL_WEIGHTS, init.chunks[0] if init.chunks else 0))]
        for chunk, frame in zip(init.chunks, frames, strict=True):
            if chunk in self._uninitialised:
                self.store.load(chunk, frame)
                self._uninitialised.discard(chunk)
                if not self._uninitialised:
                    self._opened()
                    effects += self._serve_all()
        return effects

    def _init_rows(self, sender: str, init: InitialRows, frames: Frames) -> list[Send]:
        effects = [Send(sender, Accepted(Request.INITIAL_ROWS, init.id))]
        key = init.table, init.page
        if self.layout is None or key not in self._awaited_pages():
            raise WireError(f"first rows from {sender} do not fit the model agreed on")
        if key in self._uninitialised:
            assert self.tables is not None and self.classifiers is not None
            tables = len(self.layout.tables)
            if init.table < tables:
                self.tables.load(init.table, init.page, frames)
            else:
                self.classifiers.load(init.table - tables, init.page, frames)
            self._uninitialised.discard(key)
            if not self._uninitialised:
                self._opened()
                effects += self._serve_all()
        return effects

    def _awaited_pages(self) -> set[tuple[int, int]]:
        """(table, page) of first values that a worker is to send, classifiers counted after the tables."""
        assert self.tables is not None and self.classifiers is not None and self.layout is not None
        after = len(self.layout.tables)
        return self.tables.awaited() | {(after + number, page) for number, page in self.classifiers.awaited()}

    def _share(self, sender: str, share: OfferSharedMemory) -> list[Send]:
        """See whether there is memory that this worker and this server both reach."""
        if self.planes is None:
            raise WireError(f"{sender} offers memory before the model is agreed on")
        self._drop_region(sender)
        if share.gradients is not None and self.settings.transport == "auto":
            try:
                self._regions[sender] = attach(share.gradients)
            except NotShared as error:
                log.info("%s sends its gradients: %s", sender, error)
        return [Send(sender, SharedMemoryReply(sender in self._regions, self.planes.handle))]

    @property
    def traffic(self) -> Traffic:
        return self.store.traffic if self.store is not None else Traffic()

    def _may_update_classifiers(self) -> bool:
        """Whether nobody reads their rows where they are."""
        return self.capture is None and not self.is_writing()

    @property
    def _open(self) -> bool:
        return self._setup is not None and not self._uninitialised and not self.restoring

    def round_plan(self, index: int) -> Round:
        """Raises WireError for a round no plan knows."""
        for segment in reversed(self.segments):
            if segment.first_round <= index < segment.end:
                return segment.round(index)
        raise WireError(f"no plan knows round {index}")

    def _check(
        self, sender: str, push: Push, frames: Frames, plan: Round | None, values: Sequence[Sum] | None = None
    ) -> Sequence[Sum]:
        """The push's tensors, which are `values` if those came early. Raises WireError unless all of it fits the layout and the
        plan, or where there is none, as workers step locally, the number of workers."""
        if self.store is None or self._setup is None or not self._open:
            raise WireError(f"{sender} pushed before the first weights were set")
        check_distinct(push.chunks, self.chunks, f"a push of {sender}")
        check_distinct(push.coded, push.chunks, f"a push of {sender}")
        if len(push.chunks) != len(push.present):
            raise WireError(f"a push of {sender} names chunks {push.chunks} and says what is present of {len(push.present)}")
        full = {i for i, bits in zip(push.chunks, push.present, strict=True) if self.chunks[i].has_values(bits)}
        count_of_frames = len(full) if push.gradient_buffer < 0 and values is None else 0
        if len(frames) != count_of_frames or not full.issuperset(push.coded):
            raise WireError(f"a push of {sender} names chunks {push.chunks} with {len(frames)} frames")
        if not push.scale > 0 or math.frexp(push.scale)[0] != 0.5:
            raise WireError(f"a push of {sender} is to be multiplied by {push.scale}, which is no power of two")
        count = self.settings.workers if plan is None else plan.micro_batches
        if not is_node((push.lo, push.hi), count):
            raise WireError(f"a push of {sender} is for micro-batches {push.lo}..{push.hi - 1} of {count}")
        if plan is not None and (push.samples, push.micro_batches) != (plan.samples_in(push.lo, push.hi), push.hi - push.lo):
            raise WireError(f"a push of {sender} counts {push.samples} samples, which is not what the plan has")
        check_hypers(push.hypers, self._setup[0].update)
        if values is not None:
            return values
        if push.gradient_buffer >= 0:
            slot = self._slot(sender, push.gradient_buffer)
            stays = self.policy.applies == "round" and not self.policy.is_local
            present = zip(push.chunks, push.present, strict=True)
            return [self.store.view(i, slot[i], bits, push.scale, stays) for i, bits in present]
        left = iter(frames)
        parts = [(i, next(left) if i in full else None, bits) for i, bits in zip(push.chunks, push.present, strict=True)]
        return [self._received(push, chunk, frame, present) for chunk, frame, present in parts]

    def _received(self, push: Push, chunk: int, frame: Any, present: int) -> Sum:
        assert self.store is not None
        if chunk in push.coded:
            seed = push_seed(self.settings, push.round, push.lo, push.hi, chunk)
            return self.store.decode(chunk, frame, present, seed)
        return self.store.receive(chunk, frame, present, push.scale)

    def _check_rows(self, sender: str, push: RowPush, frames: Frames, plan: Round) -> RowSums:
        """The push's rows. Raises WireError unless all of it fits the tables and the plan."""
        if self.tables is None or self._setup is None or not self._open:
            raise WireError(f"{sender} pushed before the first weights were set")
        if not is_node((push.lo, push.hi), plan.micro_batches) or push.samples != plan.samples_in(push.lo, push.hi):
            raise WireError(f"rows from {sender} are for micro-batches {push.lo}..{push.hi - 1} of {plan.micro_batches}")
        check_hypers(push.hypers, self._setup[0].update)
        return self.tables.receive(push, frames, f"a push of {sender}")

    def _check_classes(self, sender: str, push: LayerPush, frames: Frames, plan: Round) -> list[Contributed]:
        """What the push has for classifiers. Raises WireError unless all of it fits them and the plan."""
        if self.classifiers is None or not self._open:
            raise WireError(f"{sender} pushed before the first weights were set")
        if not is_node((push.lo, push.hi), plan.micro_batches) or push.samples != plan.samples_in(push.lo, push.hi):
            raise WireError(f"classes from {sender} are for micro-batches {push.lo}..{push.hi - 1} of {plan.micro_batches}")
        return self.classifiers.receive(sender, push, frames)

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
        rows, classes = [ROWS] if self.tables else [], [CLASSES] if self.classifiers else []
        return [*([METRICS] if self.index == 0 else []), *rows, *classes, *self.chunks]

    def _pull_rows(self, sender: str, pull: RowPull, frames: Frames) -> list[Send]:
        found = self.tables.read(pull, frames) if self.tables is not None and self._open else None
        return [] if found is None else [Send(sender, Rows(pull.number, found[0]), found[1])]

    def _pull(self, sender: str, pull: Pull) -> list[Send]:
        if pull.number < self._asked_for.get(sender, 0):
            return []  # it was under way for long, and its sender has gone on since
        if len(pull.have_chunks) > len(self.chunks):
            raise WireError(f"a pull of {sender} says that it has {len(pull.have_chunks)} chunks of {len(self.chunks)}")
        self._asked_for[sender] = pull.number
        self.waiters[sender] = waiter = WaitingWorker(pull)
        self._needs(waiter)
        self.readers.asks(sender, pull.weight_buffer)
        return self._serve(sender)

    def _needs(self, waiter: WaitingWorker) -> None:
        """Have a waiter's `unsent` reach to all chunks that it is now known to need."""
        pull = waiter.pull
        needed = {i for i in self.chunks if pull.frozen or not self._lies_still(i, pull.for_round)} - set(pull.have_chunks)
        waiter.unsent |= needed - waiter.needed
        waiter.needed |= needed

    def _lies_still(self, chunk: int, version: int) -> bool:
        """Whether the weights of `version` of a frozen chunk are the first ones, which lie in the plane for those."""
        return self.chunks[chunk].frozen and version < self._moved_at.get(chunk, version + 1)

    def _moves(self, version: int) -> None:
        """Note the frozen chunks that are still no more, from the weights of `version` on."""
        assert self.store is not None
        for chunk in self._frozen - self._moved_at.keys():
            if not self.store.is_still(chunk):
                self._moved_at[chunk] = version

    def _settle_still(self) -> None:
        """Have the first weights of frozen chunks where they stay."""
        assert self.store is not None and self.planes is not None
        for chunk in self._frozen:
            if self.store.is_still(chunk):
                self.store.settle(chunk, self.planes[self.planes.home][chunk])

    def _got(self, sender: str, got: WeightsCredit) -> list[Send]:
        waiter = self.waiters.get(sender)
        if waiter is None or waiter.pull.for_round != got.for_round or not set(got.chunks) <= set(self.chunks):
            return []
        for chunk in got.chunks:
            waiter.bytes_under_way.pop(chunk, None)
        return self._serve(sender)

    def _serve_all(self) -> list[Send]:
        return [effect for worker in list(self.waiters) for effect in self._serve(worker)]

    def _weights(
        self,
        to: str,
        version: int,
        plane: int,
        weights: Mapping[int, torch.Tensor],
        closed: bool,
        coded: Mapping[int, memoryview],
    ) -> list[Send]:
        """Where to read the weights of some chunks, or if they are not shared, messages of up to a chunk's size each, as many
        as may be on their way; those which the forward pass needs first go first. Those in `coded` are sent as these frames.
        Ends the wait when all is sent."""
        waiter = self.waiters[to]
        clock = waiter.pull.for_round
        moved = [chunk for chunk, since in self._moved_at.items() if since <= clock] if closed else []
        if plane >= 0:
            self.readers.sent(to, plane)  # frames, too, are sent from where the weights are
        if waiter.pull.shared and plane >= 0:
            assert self.planes is not None
            del self.waiters[to]
            still = sorted(chunk for chunk in weights if self._lies_still(chunk, version))
            moving, home = sorted(weights.keys() - set(still)), self.planes.home
            return [
                Send(
                    to,
                    Weights(
                        clock,
                        version,
                        moving,
                        closed,
                        plane,
                        frozen_chunks=still,
                        frozen_buffer=home,
                        changed_frozen=moved,
                    ),
                )
            ]
        effects = []
        if closed and not waiter.closed:
            waiter.closed = True
            effects.append(Send(to, Weights(clock, version, [], closed, changed_frozen=moved)))
        sizes = {i: coded[i].nbytes if i in coded else self.chunks[i].weight_bytes for i in weights}
        soonest = sorted(weights, key=lambda i: urgency(self.chunks[i]))
        for ids in message_batches(soonest, sizes.__getitem__):
            under_way = sum(waiter.bytes_under_way.values())
            if under_way and under_way + sum(sizes[i] for i in ids) > CREDIT_BYTES:
                break
            waiter.bytes_under_way |= {i: sizes[i] for i in ids}
            waiter.unsent -= set(ids)
            message = Weights(clock, version, ids, coded=[i for i in ids if i in coded])
            effects.append(Send(to, message, [coded[i] if i in coded else to_frame(weights[i]) for i in ids]))
        if waiter.closed and not waiter.unsent:
            del self.waiters[to]
        return effects


def contribution(
    sender: str, push: Push, outcome: Literal["committed", "duplicate", "dropped", "late"], staleness: int | None = None
) -> Contribution:
    """The ledger's row for a push."""
    return Contribution(push.round, push.lo, push.hi, sender, push.samples, push.micro_batches, outcome, staleness)
