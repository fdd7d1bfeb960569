"""The base class of shards. A shard decides which contributions count, when to apply them, and which weights a worker gets.

A shard is a state machine without a socket, a thread or a clock: `handle(sender, message, frames, now)` returns the messages to
send. `SyncShard` applies contributions once per round, `AsyncShard` applies each push at once. `ShardModel` holds the weights.

Invariants, which the tests check over random schedules:

- A micro-batch of a round counts at most once in each chunk, whatever is sent again, late or by whom.
- Weights handed out for a round hold every update before that round, and no later update (`SyncShard`).
- A worker starts a round only as far ahead as the policy admits (`AsyncShard`).
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

#: A shard remembers for this many rounds which contributions counted, to acknowledge pushes that workers send again.
_REMEMBERED = 64


@dataclass(frozen=True)
class ShardParts:
    """The parts of a shard that the server makes before workers have agreed on a model."""

    context: ShardContext
    plans: Plans
    reports: ReportQueue
    checkpoint: ShardCheckpoint
    progress: Progress


class Shard(ABC):
    """The part that `SyncShard` and `AsyncShard` share.

    The server makes a shard when the model is known. It calls `opened` when all weights and optimizer state have arrived.
    """

    def __init__(self, parts: ShardParts, model: ShardModel) -> None:
        self.model = model
        self._context, self._plans, self._reports = parts.context, parts.plans, parts.reports
        self._checkpoint, self._progress = parts.checkpoint, parts.progress
        self._index, self._settings, self._policy = parts.context.index, parts.context.settings, parts.context.policy
        self._validator = PushValidator(parts.context, model)
        self._tentative = TentativePushes(parts.context, model, parts.plans, self._validator)
        self.sender = WeightsSender(model)
        #: By round and (worker, lo, hi): the chunks in which that worker's contribution counted.
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

    # ---- methods of the two kinds of shard

    @property
    @abstractmethod
    def version(self) -> int:
        """Return the first round that is not applied in full. All rounds before it are applied."""

    @property
    @abstractmethod
    def first_not_begun(self) -> int:
        """Return the first update of which nothing is applied, and that no worker may have begun because of this server."""

    @property
    def at_border(self) -> bool:
        """Return True if the shard can be saved as that of `version`: `extra` records any part of a later round in it."""
        return True

    @property
    def seen(self) -> Mapping[int, torch.Tensor]:
        """Return by chunk the weights that workers compute from, if these may differ from the masters. Empty otherwise."""
        return {}

    def extra(self) -> dict[str, Any]:
        """Return the values, beside tensors, that a checkpoint must hold."""
        return {}

    @abstractmethod
    def missing(self) -> list[int]:
        """Return the micro-batches of round `version` that have not arrived in full. The coordinator may reassign them."""

    def missing_later(self) -> list[list[int]]:
        """Return for each round after `version` that workers have reached the micro-batches that have not arrived in full.

        If there are many, return only the first ones. If only one round is open at a time, return an empty list.
        """
        return []

    @abstractmethod
    def resume(self, source: Source) -> None:
        """Continue at the round of the checkpoint `source`, whose tensors are already loaded."""

    @abstractmethod
    def opened(self, source: Source | None) -> None:
        """Start serving: all weights have arrived. They came from the checkpoint `source` if that is not None."""

    def plan_known(self) -> list[Send]:
        """Return the messages to send after a worker has announced a plan."""
        return []

    @abstractmethod
    def push(self, sender: str, push: Push, values: Callable[[], Sequence[Sum]], now: float) -> list[Send]:
        """Take a contribution and return the messages to send. `values` returns the contribution, or raises WireError."""

    @abstractmethod
    def push_kind(self, kind: ParameterKind, sender: str, push: Any, frames: Frames, now: float) -> list[Send]:
        """Take a contribution to embedding rows or sharded layers, and return the messages to send."""

    def decide(self, body: Body, now: float) -> list[Send]:
        """Take a decision about a round, or another server's question about one, and return the messages to send.

        Raises WireError if the message makes no sense.
        """
        raise WireError(f"a server has no use for {type(body).__name__}")

    @abstractmethod
    def serve(self, worker: str) -> list[Send]:
        """Return messages with the weights that a waiting worker may have now."""

    def tick(self, now: float) -> list[Send]:
        """Return the messages that are due at `now`."""
        return []

    def work(self, now: float) -> list[Send]:
        """Return the messages to send after sharded layers have done some work."""
        return []

    def begin_backup(self) -> None:  # noqa: B027
        """Start to send the shard's state to its backup, if the run has replicas and the backup has no copy."""

    @abstractmethod
    def released(self, now: float) -> list[Send]:
        """Return the messages to send after the coordinator has let the shard begin more updates, or has ended the run."""

    def go_on(self, now: float) -> list[Send]:
        """Return the messages to send after the backup has made progress."""
        return []

    # ---- events

    def handle(self, sender: str, body: Body, frames: Frames, now: float) -> list[Send]:
        """Take one message of a worker and return the messages to send. If it raises WireError, nothing has changed."""
        handler = self._handlers.get(type(body))
        if handler is None:
            raise WireError(f"a server has no use for {type(body).__name__}")
        return handler(sender, body, frames, now)

    def forget(self, worker: str) -> None:
        """Forget a lost worker, and unmap its memory. Contributions that already count still count."""
        self._tentative.forget(worker)
        self.sender.forget(worker)
        self.model.layers.forget(worker)
        self._validator.forget(worker)

    def serve_all(self) -> list[Send]:
        """Return messages with the weights that waiting workers may have now."""
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

    # ---- counted contributions

    def _counts(self, sender: str, push: Push, chunk: int) -> None:
        """Record that `push` counts in `chunk`."""
        if push.round not in self._counted:
            for old in [round_ for round_ in self._counted if round_ < push.round - _REMEMBERED]:
                del self._counted[old]
        self._counted.setdefault(push.round, {}).setdefault((sender, push.lo, push.hi), set()).add(chunk)

    def _ack(self, sender: str, push: Push) -> Send:
        """Return the acknowledgement of `push`. It names the chunks in which neither `push` nor an earlier copy counted."""
        counted = self._counted.get(push.round, {}).get((sender, push.lo, push.hi), set())
        ignored = [chunk for chunk in push.chunks if chunk not in counted]
        return Send(sender, Ack(push.round, push.lo, push.hi, push.chunks, push.metrics is not None, ignored=ignored))

    def _ack_of(self, sender: str, push: Push | RowPush | LayerPush) -> Send:
        """Return the acknowledgement of a push of any kind that counts nowhere."""
        return self._ack(sender, push) if isinstance(push, Push) else Send(sender, self._kind_of[type(push)].ack(push))

    # ---- checkpoints

    def _before_tables_change(self) -> None:
        self._checkpoint.flush(self.model)
        self._context.finish_writing()

    def _may_update_layers(self) -> bool:
        """Return True if no checkpoint reads the sharded layers' rows in place."""
        return self._checkpoint.stage is not Stage.COMPLETE and not self._context.is_writing()


def contribution(
    sender: str, push: Push, outcome: Literal["committed", "duplicate", "dropped", "late"], staleness: int | None = None
) -> Contribution:
    """Return the ledger's row for a push."""
    return Contribution(push.round, push.lo, push.hi, sender, push.samples, push.micro_batches, outcome, staleness, push.weight)
