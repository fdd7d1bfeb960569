"""Sends weights to workers that wait for them."""

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
from roundtable.ps.shard.newest_settings import NewestSettings

#: At most this many bytes of weights are under way to a worker, so that an urgent chunk does not wait long behind others.
CREDIT_BYTES = 8 << 20


@dataclass
class WaitingWorker:
    """A worker that waits for weights."""

    pull: Pull
    #: Needed chunks that were not sent.
    unsent: set[int] = field(default_factory=set)
    #: All chunks that the worker is known to need.
    needed: set[int] = field(default_factory=set)
    #: True once the worker was told that the previous round is closed.
    round_closed: bool = False
    #: By chunk: bytes sent and not credited.
    bytes_under_way: dict[int, int] = field(default_factory=dict)
    #: If each push is applied at once: the weights at the moment when the worker might go on.
    weights: Mapping[int, torch.Tensor] | None = None
    #: By chunk: frames of the weight codec to send instead of `weights`.
    coded: Mapping[int, memoryview] = field(default_factory=dict)
    #: The version of `weights`.
    version: int = -1


class WeightsSender:
    """The workers that wait for weights of this shard, and the chunks that each of them still needs."""

    def __init__(self, model: ShardModel) -> None:
        self._model = model
        self.waiting: dict[str, WaitingWorker] = {}
        #: The weight buffers that workers may be reading.
        self.readers = Readers()
        self.settings = NewestSettings()
        #: The number of each worker's newest pull.
        self._newest_pull: dict[str, int] = {}

    def pull(self, sender: str, pull: Pull) -> bool:
        """Record that a worker waits. Return False if the pull is older than another one of the same worker.

        Raises WireError if the pull lists more chunks than this shard has.
        """
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
        """Add to `unsent` the chunks that the worker is now known to need and was not sent."""
        pull, frozen = waiter.pull, self._model.frozen
        needed = {i for i in self._model.chunks if pull.frozen or not frozen.unchanged(i, pull.for_round)} - set(pull.have_chunks)
        waiter.unsent |= needed - waiter.needed
        waiter.needed |= needed

    def credited(self, sender: str, credit: WeightsCredit) -> bool:
        """Note that frames have arrived. Return True if more may be sent."""
        waiter = self.waiting.get(sender)
        if waiter is None or waiter.pull.for_round != credit.for_round or not set(credit.chunks) <= set(self._model.chunks):
            return False
        for chunk in credit.chunks:
            waiter.bytes_under_way.pop(chunk, None)
        return True

    def forget(self, worker: str) -> None:
        """Forget a lost worker."""
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
        """Return messages with the weights of some chunks, which lie in weight buffer `buffer` if that is not -1.

        A worker that shares memory gets the buffer's number. Other workers get messages of at most a chunk's size, up to
        `CREDIT_BYTES`. Chunks that the forward pass needs first go first. A chunk in `coded` goes as that frame. The worker no
        longer waits once all its chunks are sent.
        """
        waiter = self.waiting[to]
        round_ = waiter.pull.for_round
        changed = self._model.frozen.changed(round_) if round_closed else []
        if buffer >= 0:
            self.readers.sent(to, buffer)  # sockets, too, send straight from the buffer
        if waiter.pull.shared and buffer >= 0:
            del self.waiting[to]
            frozen = sorted(chunk for chunk in weights if self._model.frozen.unchanged(chunk, version))
            others, home = sorted(weights.keys() - set(frozen)), self._model.buffers.home
            told = Weights(
                round_,
                version,
                others,
                round_closed,
                buffer,
                frozen_chunks=frozen,
                frozen_buffer=home,
                changed_frozen=changed,
                settings=self.settings.before(round_) if round_closed else None,
            )
            return [Send(to, told)]
        effects = []
        if round_closed and not waiter.round_closed:
            waiter.round_closed = True
            settings = self.settings.before(round_)
            effects.append(Send(to, Weights(round_, version, [], round_closed, changed_frozen=changed, settings=settings)))
        effects += self._frames(to, waiter, version, weights, coded)
        if waiter.round_closed and not waiter.unsent:
            del self.waiting[to]
        return effects

    def _frames(
        self, to: str, waiter: WaitingWorker, version: int, weights: Mapping[int, torch.Tensor], coded: Mapping[int, memoryview]
    ) -> list[Send]:
        """Return messages with chunks of `weights`, the most urgent first, as many as the worker's credit allows."""
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
