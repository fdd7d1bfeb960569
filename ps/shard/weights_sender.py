"""Weights on their way to workers that wait for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from roundtable.common.model.layout import message_batches, urgency
from roundtable.common.model.tensor_bytes import to_frame
from roundtable.common.protocol.effects import Send
from roundtable.common.protocol.messages.gradients import Pull, Weights, WeightsCredit
from roundtable.common.runtime.errors import WireError
from roundtable.ps.params.weight_buffers import Readers
from roundtable.ps.shard.model import ShardModel

#: Bytes of weights that may be on their way to a worker, so that what is needed sooner does not wait for long behind others.
CREDIT_BYTES = 8 << 20


@dataclass
class WaitingWorker:
    """A worker that waits for weights."""

    pull: Pull
    #: Chunks that were not sent yet.
    unsent: set[int] = field(default_factory=set)
    #: All chunks that it is known to need.
    needed: set[int] = field(default_factory=set)
    #: Whether it was told that the round before is closed.
    round_closed: bool = False
    #: By chunk.
    bytes_under_way: dict[int, int] = field(default_factory=dict)
    #: If each push is applied at once: the weights as they were when it was the worker's turn.
    weights: Mapping[int, torch.Tensor] | None = None
    #: The frames that some of them are sent in.
    coded: Mapping[int, memoryview] = field(default_factory=dict)
    version: int = -1


class WeightsSender:
    """Which workers wait for weights of this shard, and what each of them still needs."""

    def __init__(self, model: ShardModel) -> None:
        self._model = model
        self.waiting: dict[str, WaitingWorker] = {}
        #: Which weight buffers workers may be reading.
        self.readers = Readers()
        #: The number of each worker's newest pull.
        self._newest_pull: dict[str, int] = {}

    def pull(self, sender: str, pull: Pull) -> bool:
        """Have a worker wait. Returns False for a pull that is older than another one of its sender."""
        if pull.number < self._newest_pull.get(sender, 0):
            return False
        count = len(self._model.chunks)
        if len(pull.have_chunks) > count:
            raise WireError(f"a pull of {sender} says that it has {len(pull.have_chunks)} chunks of {count}")
        self._newest_pull[sender] = pull.number
        self.waiting[sender] = waiter = WaitingWorker(pull)
        self.update_needs(waiter)
        self.readers.asks(sender, pull.weight_buffer)
        return True

    def update_needs(self, waiter: WaitingWorker) -> None:
        """Have `unsent` contain all chunks that the worker is now known to need."""
        pull, frozen = waiter.pull, self._model.frozen
        needed = {i for i in self._model.chunks if pull.frozen or not frozen.unchanged(i, pull.for_round)} - set(pull.have_chunks)
        waiter.unsent |= needed - waiter.needed
        waiter.needed |= needed

    def credited(self, sender: str, credit: WeightsCredit) -> bool:
        """Note that frames have come. Returns True if there may be room for more."""
        waiter = self.waiting.get(sender)
        if waiter is None or waiter.pull.for_round != credit.for_round or not set(credit.chunks) <= set(self._model.chunks):
            return False
        for chunk in credit.chunks:
            waiter.bytes_under_way.pop(chunk, None)
        return True

    def forget(self, worker: str) -> None:
        """Let go of a lost worker."""
        self.waiting.pop(worker, None)
        self._newest_pull.pop(worker, None)
        self.readers.forget(worker)

    def send(
        self,
        to: str,
        version: int,
        buffer: int,
        weights: Mapping[int, torch.Tensor],
        round_closed: bool,
        coded: Mapping[int, memoryview],
    ) -> list[Send]:
        """Return messages with the weights of some chunks, which lie in `buffer` if that is not -1.

        A worker that shares memory is told where they are. Others get messages of up to a chunk's size each, as many as may be on
        their way. Chunks that the forward pass needs first go first, and those in `coded` as these frames. The wait ends when
        all is sent.
        """
        waiter = self.waiting[to]
        round_ = waiter.pull.for_round
        changed = self._model.frozen.changed(round_) if round_closed else []
        if buffer >= 0:
            self.readers.sent(to, buffer)  # frames, too, are sent from where the weights are
        if waiter.pull.shared and buffer >= 0:
            del self.waiting[to]
            frozen = sorted(chunk for chunk in weights if self._model.frozen.unchanged(chunk, version))
            others, home = sorted(weights.keys() - set(frozen)), self._model.buffers.home
            told = Weights(
                round_, version, others, round_closed, buffer, frozen_chunks=frozen, frozen_buffer=home, changed_frozen=changed
            )
            return [Send(to, told)]
        effects = []
        if round_closed and not waiter.round_closed:
            waiter.round_closed = True
            effects.append(Send(to, Weights(round_, version, [], round_closed, changed_frozen=changed)))
        effects += self._frames(to, waiter, version, weights, coded)
        if waiter.round_closed and not waiter.unsent:
            del self.waiting[to]
        return effects

    def _frames(
        self, to: str, waiter: WaitingWorker, version: int, weights: Mapping[int, torch.Tensor], coded: Mapping[int, memoryview]
    ) -> list[Send]:
        """Return as many messages as there is credit for."""
        chunks, effects = self._model.chunks, []
        sizes = {i: coded[i].nbytes if i in coded else chunks[i].weight_bytes for i in weights}
        soonest = sorted(weights, key=lambda i: urgency(chunks[i]))
        for ids in message_batches(soonest, sizes.__getitem__):
            under_way = sum(waiter.bytes_under_way.values())
            if under_way and under_way + sum(sizes[i] for i in ids) > CREDIT_BYTES:
                break
            waiter.bytes_under_way |= {i: sizes[i] for i in ids}
            waiter.unsent -= set(ids)
            message = Weights(waiter.pull.for_round, version, ids, coded=[i for i in ids if i in coded])
            effects.append(Send(to, message, [coded[i] if i in coded else to_frame(weights[i]) for i in ids]))
        return effects
