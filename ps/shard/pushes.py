"""Checks pushes against the model and the plan, and keeps tentative pushes until they count."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from roundtable.common.codecs.registry import push_seed
from roundtable.common.config.batch_plan import Round
from roundtable.common.model.gradient_buffer_layout import memory_of, views
from roundtable.common.model.partial_sum import Sum
from roundtable.common.model.reduction_tree import is_node
from roundtable.common.protocol.effects import Send
from roundtable.common.protocol.messages.embedding import RowPush
from roundtable.common.protocol.messages.gradients import Ack, Push
from roundtable.common.protocol.messages.setup import OfferSharedMemory
from roundtable.common.protocol.messages.sharded import LayerPush
from roundtable.common.protocol.shared_memory import NotShared, Region, attach
from roundtable.common.protocol.transport import Frames
from roundtable.common.runtime.errors import WireError
from roundtable.ps.shard.context import Plans, ShardContext
from roundtable.ps.shard.kinds import ParameterKind
from roundtable.ps.shard.model import ShardModel
from roundtable.ps.validation import check_distinct, check_hypers

log = logging.getLogger("roundtable.ps.shard")

#: A server keeps the tentative parts of at most this many contributions of one worker.
_TENTATIVE = 2


class PushValidator:
    """Turns pushes into contributions, or refuses them. If a method raises WireError, nothing has changed."""

    def __init__(self, context: ShardContext, model: ShardModel) -> None:
        self._settings, self._policy, self._model = context.settings, context.policy, model
        #: By worker: its memory that this server can read.
        self._regions: dict[str, Region] = {}
        #: By worker and gradient buffer: the chunks in that buffer.
        self._gradient_buffers: dict[tuple[str, int], dict[int, torch.Tensor]] = {}

    # ---- workers' memory

    def attach(self, sender: str, offer: OfferSharedMemory) -> bool:
        """Map a worker's gradient buffers. Return True if this server can read them."""
        self.forget(sender)
        if offer.gradients is not None and self._settings.transport == "auto":
            try:
                self._regions[sender] = attach(offer.gradients)
            except NotShared as error:
                log.info("%s sends its gradients over TCP: %s", sender, error)
        return sender in self._regions

    def forget(self, worker: str) -> None:
        """Unmap a worker's gradient buffers."""
        self._gradient_buffers = {key: views for key, views in self._gradient_buffers.items() if key[0] != worker}
        if worker in self._regions:
            self._regions.pop(worker).close()

    def _gradient_buffer(self, sender: str, number: int) -> dict[int, torch.Tensor]:
        if (sender, number) not in self._gradient_buffers:
            region, layout = self._regions.get(sender), self._model.layout
            if region is None:
                raise WireError(f"{sender} has shared no memory with this server")
            try:
                self._gradient_buffers[sender, number] = views(layout, memory_of(layout, region, number))
            except IndexError as error:
                raise WireError(f"a push of {sender}: {error}") from None
        return self._gradient_buffers[sender, number]

    # ---- pushes

    def check_open(self, sender: str) -> None:
        """Raise WireError if the shard's weights have not all arrived."""
        if not self._model.is_open:
            raise WireError(f"{sender} pushed before the first weights were set")

    def contributions(self, sender: str, push: Push, frames: Frames, plan: Round | None) -> Sequence[Sum]:
        """Return a push's contributions, one for each of its chunks. Raises WireError if the push or its frames do not fit."""
        full = self.check(sender, push, plan)
        count_of_frames = len(full) if push.gradient_buffer < 0 else 0
        if len(frames) != count_of_frames or not full.issuperset(push.coded):
            raise WireError(f"a push of {sender} names chunks {push.chunks} with {len(frames)} frames")
        present = zip(push.chunks, push.present, strict=True)
        if push.gradient_buffer >= 0:
            buffer = self._gradient_buffer(sender, push.gradient_buffer)
            stays = self._policy.applies == "round" and not self._policy.is_local
            return [self._model.dense.view(i, buffer[i], bits, push.scale, stays) for i, bits in present]
        left = iter(frames)
        return [self._received(push, i, next(left) if i in full else None, bits) for i, bits in present]

    def check(self, sender: str, push: Push, plan: Round | None) -> set[int]:
        """Return the chunks of a push that have values.

        Raises WireError unless the push, apart from its frames, fits the model and the plan. If workers step locally, `plan` is
        None and a round has one contribution of each worker.
        """
        self.check_open(sender)
        chunks = self._model.chunks
        check_distinct(push.chunks, chunks, f"a push of {sender}")
        check_distinct(push.coded, push.chunks, f"a push of {sender}")
        if len(push.chunks) != len(push.present):
            raise WireError(f"a push of {sender} names chunks {push.chunks} but has {len(push.present)} masks of pieces")
        if not push.scale > 0 or math.frexp(push.scale)[0] != 0.5:
            raise WireError(f"a push of {sender} has the scale {push.scale}, which is not a power of two")
        count = self._settings.workers if plan is None else plan.micro_batches
        if not is_node((push.lo, push.hi), count):
            raise WireError(f"a push of {sender} is for micro-batches {push.lo}..{push.hi - 1} of {count}")
        if plan is not None and (push.samples, push.micro_batches) != (plan.samples_in(push.lo, push.hi), push.hi - push.lo):
            raise WireError(f"a push of {sender} counts {push.samples} samples, which differs from the plan")
        check_hypers(push.hypers, self._model.setup.update)
        return {i for i, bits in zip(push.chunks, push.present, strict=True) if chunks[i].has_values(bits)}

    def _received(self, push: Push, chunk: int, frame: Any, present: int) -> Sum:
        if chunk in push.coded:
            seed = push_seed(self._settings, push.round, push.lo, push.hi, chunk)
            return self._model.dense.decode(chunk, frame, present, seed)
        return self._model.dense.receive(chunk, frame, present, push.scale)

    def of_kind(self, kind: ParameterKind, sender: str, push: RowPush | LayerPush, frames: Frames, plan: Round) -> Any:
        """Return the contribution of a push to parameters of `kind`. Raises WireError if the push does not fit."""
        self.check_open(sender)
        if not is_node((push.lo, push.hi), plan.micro_batches) or push.samples != plan.samples_in(push.lo, push.hi):
            raise WireError(f"{kind.noun} from {sender} are for micro-batches {push.lo}..{push.hi - 1} of {plan.micro_batches}")
        check_hypers(push.hypers, self._model.setup.update)
        return kind.receive(sender, push, frames)


@dataclass
class _Tentative:
    """A contribution that a worker is still computing."""

    #: By chunk: values that have arrived and do not count yet.
    values: dict[int, Sum] = field(default_factory=dict)
    #: Chunks that the worker has committed.
    committed: set[int] = field(default_factory=set)


class TentativePushes:
    """Parts of contributions that a server keeps until their worker commits them."""

    def __init__(self, context: ShardContext, model: ShardModel, plans: Plans, validator: PushValidator) -> None:
        self._policy, self._model, self._plans, self._validator = context.policy, model, plans, validator
        #: By worker and (round, lo, hi).
        self.kept: dict[str, dict[tuple[int, int, int], _Tentative]] = {}

    def keep(self, sender: str, push: Push, frames: Frames) -> Send:
        """Keep a push until its worker commits it or has moved on to other contributions. Return the acknowledgement.

        Raises WireError if the push does not fit.
        """
        self._check(sender, push)
        values = self._validator.contributions(sender, push, frames, self._plans.round(push.round))
        self._of(sender, push).values.update(zip(push.chunks, values, strict=True))
        return Send(sender, Ack(push.round, push.lo, push.hi, push.chunks, tentative=True))

    def is_committed(self, sender: str, push: Push) -> bool:
        """Return True if the worker has committed all chunks of `push`."""
        return self._of(sender, push).committed.issuperset(push.chunks)

    def commit(self, sender: str, push: Push) -> Sequence[Sum] | None:
        """Commit the chunks of `push`. Return their values, or None if some have not arrived.

        Chunks that arrive after their commit count at once.
        """
        self._check(sender, push)
        found = self._of(sender, push)
        found.committed.update(push.chunks)
        if not set(push.chunks) <= set(found.values):
            return None
        return [found.values.pop(chunk) for chunk in push.chunks]

    def forget(self, worker: str) -> None:
        """Drop the tentative parts of a lost worker."""
        self.kept.pop(worker, None)

    def _check(self, sender: str, push: Push) -> None:
        """Raise WireError if `push` cannot be tentative."""
        check_distinct(push.chunks, self._model.chunks, f"a push of {sender}")
        if push.gradient_buffer >= 0 or push.metrics is not None or self._policy.is_local:
            raise WireError(f"{sender} sends a tentative push that cannot be tentative")
        self._plans.round(push.round)

    def _of(self, sender: str, push: Push) -> _Tentative:
        kept = self.kept.setdefault(sender, {})
        if push.key not in kept:
            for old in list(kept)[: 1 - _TENTATIVE]:
                del kept[old]
            kept[push.key] = _Tentative()
        return kept[push.key]
