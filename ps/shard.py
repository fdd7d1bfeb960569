"""What a server decides: which contributions count, when they are applied, and who gets which weights.

State machines without a socket, a thread or a clock: `handle(sender, message, frames, now)` and `tick(now)` return what to
send. `RoundShard` applies once per round, `PushShard` each push at once; here is what they share. The numbers are the
store's. Invariants, which the tests check over random schedules:

- a micro-batch of a round counts at most once in each chunk, whatever is sent again, late or by whom;
- weights handed out for a round hold every update before it, and nothing of later ones (`RoundShard`);
- a worker starts a round only as far ahead as the policy admits (`PushShard`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

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
    Setup,
    Weights,
)  # fmt: skip
from common.plan import Round, Segment
from common.policies import Policy
from common.settings import Settings
from common.sums import Sum
from common.tree import is_node
from common.wire import ASK_AGAIN_S, Frames
from ps.store import Store

COORDINATOR = "coordinator"
#: Seconds between two reports to the coordinator while there is news.
REPORT_S = 0.1
#: Id under which server 0 files the metrics of a contribution, beside its chunks.
METRICS = -1

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
        self.segments: list[Segment] = []
        #: The Setup that defined the model, and who sent it.
        self._setup: tuple[Setup, str] | None = None
        #: Chunks whose first weights are still to come.
        self._uninitialised: set[int] = set()
        #: Who waits for which round's weights, and which chunks of them were not sent yet.
        self.waiters: dict[str, tuple[Pull, set[int]]] = {}
        self._news: list[Contribution] = []
        self._rounds: list[Committed] = []
        self._report: Report | None = None
        self._report_at = 0.0
        self._reported_version = -1

    # ---- what differs

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
            case Setup():
                return self._set_up(sender, body)
            case Plan():
                return self._plan(sender, body.segment)
            case Init():
                return self._init(sender, body, frames)
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
            layout = make_layout(setup.tensors, self.settings.servers)
            self.store = Store(layout, self.index, setup.update, self.policy)
            self.layout = layout
            self.chunks = {chunk.id: chunk for chunk in layout.on(self.index)}
            self._uninitialised = set(self.chunks)
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
        if not len(push.chunks) == len(push.present) == len(frames) or not set(push.chunks) <= set(self.chunks):
            raise WireError(f"a push of {sender} names chunks {push.chunks} with {len(frames)} frames")
        if not is_node((push.lo, push.hi), count):
            raise WireError(f"a push of {sender} is for micro-batches {push.lo}..{push.hi - 1} of {count}")
        if push.samples < 0 or (samples is not None and push.samples != samples):
            raise WireError(f"a push of {sender} counts {push.samples} samples where the plan has {samples}")
        return [self.store.receive(*item) for item in zip(push.chunks, frames, push.present, strict=True)]

    # ---- weights

    def _pull(self, sender: str, pull: Pull) -> list[Send]:
        self.waiters[sender] = pull, set(self.chunks) - set(pull.have)
        return self._serve(sender)

    def _serve_all(self) -> list[Send]:
        return [effect for worker in list(self.waiters) for effect in self._serve(worker)]

    def _weights(self, to: str, pull: Pull, version: int, frames: dict[int, Any], metrics: dict[str, float] | None) -> list[Send]:
        """Messages of up to a chunk's size each; the metrics go with the last."""
        effects: list[Send] = []
        for ids in message_batches(sorted(frames), lambda i: self.chunks[i].weight_bytes):
            effects.append(Send(to, Weights(pull.clock, version, ids), [frames[i] for i in ids]))
        if metrics is not None:
            last = effects.pop() if effects else Send(to, Weights(pull.clock, version, []))
            ids = last.body.chunks if isinstance(last.body, Weights) else []
            effects.append(Send(to, Weights(pull.clock, version, ids, metrics), last.frames))
        return effects


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
    return f"{sender} asks for another optimizer than {owner}: {other.update} instead of {known.update}."
