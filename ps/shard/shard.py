"""What a server with a model decides: which contributions count, when they are applied, and which weights a worker gets.

State machines without a socket, a thread or a clock: `handle(sender, message, frames, now)` returns what to send. `SyncShard`
applies once per round, `AsyncShard` each push at once. Here is what they share. The numbers are those of `ShardModel`.
Invariants, which the tests check over random schedules:

- a micro-batch of a round counts at most once in each chunk, whatever is sent again, late or by whom;
- weights handed out for a round hold every update before it, and nothing of later ones (`SyncShard`);
- a worker starts a round only as far ahead as the policy admits (`AsyncShard`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from roundtable.common.model.partial_sum import Sum
from roundtable.common.protocol.effects import Send
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.commit import Contribution
from roundtable.common.protocol.messages.embedding import InitialRows, RowPull, RowPush, Rows
from roundtable.common.protocol.messages.gradients import Ack, Pull, Push, WeightsCredit
from roundtable.common.protocol.messages.setup import Accepted, InitialWeights, OfferSharedMemory, Request, SharedMemoryReply
from roundtable.common.protocol.messages.sharded import LayerPush, ShardedForward
from roundtable.common.protocol.transport import Frames
from roundtable.common.runtime.errors import WireError
from roundtable.ps.shard.checkpoint_writer import Source
from roundtable.ps.shard.context import Plans, Progress, ShardContext
from roundtable.ps.shard.kinds import ParameterKind
from roundtable.ps.shard.model import ShardModel
from roundtable.ps.shard.pushes import PushValidator, TentativePushes
from roundtable.ps.shard.report_queue import ReportQueue
from roundtable.ps.shard.shard_checkpoint import ShardCheckpoint, Stage
from roundtable.ps.shard.weights_sender import WeightsSender

#: Rounds of which it is known whose contributions counted, for workers that have not got word of it.
_REMEMBERED = 64


@dataclass(frozen=True)
class ShardParts:
    """What there is before a model is agreed on, and outlives that moment."""

    context: ShardContext
    plans: Plans
    reports: ReportQueue
    checkpoint: ShardCheckpoint
    progress: Progress


class Shard(ABC):
    """What both kinds of shard do. One is made when the model is known, and `opened` when all its numbers are here."""

    def __init__(self, parts: ShardParts, model: ShardModel) -> None:
        self.model = model
        self._context, self._plans, self._reports = parts.context, parts.plans, parts.reports
        self._checkpoint, self._progress = parts.checkpoint, parts.progress
        self._index, self._settings, self._policy = parts.context.index, parts.context.settings, parts.context.policy
        self._validator = PushValidator(parts.context, model)
        self._tentative = TentativePushes(parts.context, model, parts.plans, self._validator)
        self.sender = WeightsSender(model)
        #: By round and (worker, lo, hi): the chunks in which that worker's contribution counted when it came.
        self._counted: dict[int, dict[tuple[str, int, int], set[int]]] = {}
        model.tables.before_update = self._before_tables_change
        model.layers.let_update(self._may_update_layers)
        self._handlers: dict[type[Body], Callable[[str, Any, Frames, float], list[Send]]] = {
            Push: self._on_push,
            RowPush: self._on_kind,
            LayerPush: self._on_kind,
            Pull: self._on_pull,
            WeightsCredit: self._on_credit,
            RowPull: self._on_row_pull,
            ShardedForward: self._on_question,
            InitialWeights: self._on_initial_weights,
            InitialRows: self._on_initial_rows,
            OfferSharedMemory: self._on_offer,
        }
        self._kind_of: dict[type[Body], ParameterKind] = {kind.push_type: kind for kind in model.kinds}

    # ---- what differs

    @property
    @abstractmethod
    def version(self) -> int:
        """Return the number of rounds that are applied, of those in a row from the first on."""

    @property
    @abstractmethod
    def at_border(self) -> bool:
        """Return True if the weights are those of `version`, and nothing of later rounds is in them."""

    @property
    @abstractmethod
    def seen(self) -> Mapping[int, torch.Tensor]:
        """Return the weights that workers compute from now, by chunk, where these may not be the master's."""

    @abstractmethod
    def extra(self) -> dict[str, Any]:
        """Return what a checkpoint must hold beside tensors."""

    @abstractmethod
    def missing(self) -> list[int]:
        """Return the micro-batches of round `version` that are not all here: the coordinator may reassign them."""

    @abstractmethod
    def missing_later(self) -> list[list[int]]:
        """Return the same of the rounds after it, one by one, as far as workers have got to; some of the first if they are many.
        None if one round is open at a time."""

    @abstractmethod
    def resume(self, source: Source) -> None:
        """Be at the round of a checkpoint, whose tensors are here."""

    @abstractmethod
    def opened(self, source: Source | None) -> None:
        """All numbers are here, out of the checkpoint `source` if that is not None."""

    @abstractmethod
    def plan_known(self) -> list[Send]:
        """Go on, as there may be another plan."""

    @abstractmethod
    def push(self, sender: str, push: Push, values: Callable[[], Sequence[Sum]], now: float) -> list[Send]:
        """Take a contribution. `values` returns it, or raises WireError if it does not fit."""

    @abstractmethod
    def push_kind(self, kind: ParameterKind, sender: str, push: Any, frames: Frames, now: float) -> list[Send]:
        """Take a contribution to parameters beside chunks."""

    @abstractmethod
    def decide(self, body: Body, now: float) -> list[Send]:
        """Take what the coordinator says about a round. Raises WireError if that cannot be meant."""

    @abstractmethod
    def serve(self, worker: str) -> list[Send]:
        """Send a waiting worker the weights that there are for it."""

    def tick(self, now: float) -> list[Send]:
        """Return what is due."""
        return []

    def work(self, now: float) -> list[Send]:
        """Go on with what sharded layers have done."""
        return []

    def begin_backup(self) -> None:  # noqa: B027
        """Have a backup made, if there is to be one and none is there."""

    def go_on(self, now: float) -> list[Send]:
        """Go on with what waited for nothing but the backup."""
        return []

    # ---- events

    def handle(self, sender: str, body: Body, frames: Frames, now: float) -> list[Send]:
        """Take one message of a worker. Raises WireError if it cannot be meant; then nothing has changed."""
        handler = self._handlers.get(type(body))
        if handler is None:
            raise WireError(f"a server has no use for {type(body).__name__}")
        return handler(sender, body, frames, now)

    def forget(self, worker: str) -> None:
        """Let go of what is kept for a lost worker. What it has handed in counts, wherever that lies."""
        self._tentative.forget(worker)
        self.sender.forget(worker)
        self.model.layers.forget(worker)
        self._validator.forget(worker)

    def serve_all(self) -> list[Send]:
        """Send all waiting workers what there is for them."""
        return [effect for worker in list(self.sender.waiting) for effect in self.serve(worker)]

    def _on_push(self, sender: str, push: Push, frames: Frames, now: float) -> list[Send]:
        if push.stage == "complete":
            return self.push(sender, push, lambda: self._validator.contributions(sender, push, frames, self._plan_of(push)), now)
        effects = []
        if push.stage == "tentative":
            effects = [self._tentative.keep(sender, push, frames)]
            if not self._tentative.is_committed(sender, push):
                return effects
        kept = self._tentative.commit(sender, push)
        if kept is None:
            return effects
        values = kept

        def checked() -> Sequence[Sum]:
            self._validator.check(sender, push, self._plan_of(push))
            return values

        return effects + self.push(sender, push, checked, now)

    def _plan_of(self, push: Push) -> Any:
        return None if self._policy.is_local else self._plans.round(push.round)

    def _on_kind(self, sender: str, push: RowPush | LayerPush, frames: Frames, now: float) -> list[Send]:
        kind = self._kind_of.get(type(push))
        if kind is None:
            raise WireError(f"{sender} contributes to parameters that are not here")
        return self.push_kind(kind, sender, push, frames, now)

    def _on_pull(self, sender: str, pull: Pull, frames: Frames, now: float) -> list[Send]:
        return self.serve(sender) if self.sender.pull(sender, pull) else []

    def _on_credit(self, sender: str, credit: WeightsCredit, frames: Frames, now: float) -> list[Send]:
        return self.serve(sender) if self.sender.credited(sender, credit) else []

    def _on_row_pull(self, sender: str, pull: RowPull, frames: Frames, now: float) -> list[Send]:
        found = self.model.tables.read(pull, frames) if self.model.is_open else None
        return [] if found is None else [Send(sender, Rows(pull.number, found[0]), found[1])]

    def _on_question(self, sender: str, question: ShardedForward, frames: Frames, now: float) -> list[Send]:
        answer = self.model.layers.ask(sender, question, frames) if self.model.is_open else None
        return [] if answer is None else [Send(sender, *answer)]

    def _on_initial_weights(self, sender: str, init: InitialWeights, frames: Frames, now: float) -> list[Send]:
        is_complete = self.model.initial_weights(sender, init, frames)
        answer = Send(sender, Accepted(Request.INITIAL_WEIGHTS, init.chunks[0] if init.chunks else 0))
        return [answer, *(self._begin() if is_complete else ())]

    def _on_initial_rows(self, sender: str, init: InitialRows, frames: Frames, now: float) -> list[Send]:
        is_complete = self.model.initial_rows(sender, init, frames)
        return [Send(sender, Accepted(Request.INITIAL_ROWS, init.id)), *(self._begin() if is_complete else ())]

    def _begin(self) -> list[Send]:
        self.opened(None)
        return self.serve_all()

    def _on_offer(self, sender: str, offer: OfferSharedMemory, frames: Frames, now: float) -> list[Send]:
        return [Send(sender, SharedMemoryReply(self._validator.attach(sender, offer), self.model.buffers.handle))]

    # ---- what counts

    def _counts(self, sender: str, push: Push, chunk: int) -> None:
        """Remember that `push` counts in `chunk`."""
        if push.round not in self._counted:
            for old in [round_ for round_ in self._counted if round_ < push.round - _REMEMBERED]:
                del self._counted[old]
        self._counted.setdefault(push.round, {}).setdefault((sender, push.lo, push.hi), set()).add(chunk)

    def _ack(self, sender: str, push: Push) -> Send:
        """Return what became of `push`, or of an earlier copy of it."""
        counted = self._counted.get(push.round, {}).get((sender, push.lo, push.hi), set())
        ignored = [chunk for chunk in push.chunks if chunk not in counted]
        return Send(sender, Ack(push.round, push.lo, push.hi, push.chunks, push.metrics is not None, ignored=ignored))

    # ---- checkpoints

    def _before_tables_change(self) -> None:
        self._checkpoint.flush(self.model)
        self._context.finish_writing()

    def _may_update_layers(self) -> bool:
        """Return True if nobody reads the layers' rows where they are."""
        return self._checkpoint.stage is not Stage.COMPLETE and not self._context.is_writing()


def contribution(
    sender: str, push: Push, outcome: Literal["committed", "duplicate", "dropped", "late"], staleness: int | None = None
) -> Contribution:
    """Return the ledger's row for a push."""
    return Contribution(push.round, push.lo, push.hi, sender, push.samples, push.micro_batches, outcome, staleness)
