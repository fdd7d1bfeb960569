"""Chooses the weights that a waiting worker gets, if each round makes a version."""

from __future__ import annotations

import itertools
from collections.abc import Collection

from roundtable.common.model.layout import urgency
from roundtable.common.protocol.effects import Send
from roundtable.common.protocol.messages.gradients import VersionExpired
from roundtable.ps.shard.model import ShardModel
from roundtable.ps.shard.weights_sender import WaitingWorker, WeightsSender
from roundtable.ps.updates.weight_versions import WeightVersions


class RoundServing:
    """Serves whole versions, and chunks of the next version as they are made."""

    def __init__(self, model: ShardModel, versions: WeightVersions, sender: WeightsSender) -> None:
        self._model, self._versions, self._sender = model, versions, sender

    def serve(self, worker: str, applied: Collection[int]) -> list[Send]:
        """Return messages with the weights that a waiting worker may have now. `applied` are the next version's chunks so far."""
        waiter, versions, sender = self._sender.waiting[worker], self._versions, self._sender
        round_, newest = waiter.pull.for_round, self._versions.newest
        if not self._model.is_open or round_ > newest + 1:
            return []
        if round_ == newest + 1:
            return self._serve_next(worker, waiter, applied)
        buffer = versions.buffer_of(round_)
        if buffer < 0:
            del sender.waiting[worker]
            return [Send(worker, VersionExpired(round_, newest))]
        sender.update_needs(waiter)
        if waiter.pull.full_precision and round_ == newest:
            masters = {chunk: self._model.dense.master(chunk) for chunk in waiter.unsent}
            return sender.send(worker, round_, -1, masters, True, {})
        weights = {chunk: versions.of(round_, chunk) for chunk in waiter.unsent}
        return sender.send(worker, round_, buffer, weights, True, versions.frames_for(waiter.pull, buffer))

    def _serve_next(self, worker: str, waiter: WaitingWorker, applied: Collection[int]) -> list[Send]:
        versions, round_ = self._versions, waiter.pull.for_round
        if waiter.pull.shared or waiter.pull.full_precision or versions.target is None:
            return []
        if not (ready := self._ready(waiter, applied)):
            return []
        weights, coded = {i: versions.of(round_, i) for i in ready}, versions.frames_for(waiter.pull, versions.target)
        return self._sender.send(worker, round_, versions.target, weights, False, coded)

    def _ready(self, waiter: WaitingWorker, applied: Collection[int]) -> set[int]:
        """Return the chunks of the next version to send now.

        Chunks go in the order in which the next forward pass needs them. Gradients arrive in the opposite order. If no chunk in
        order is ready and nothing is under way, one chunk goes out of order: an idle network costs more than one chunk's delay.
        """
        chunks = self._model.chunks
        soonest = sorted(waiter.unsent, key=lambda chunk: urgency(chunks[chunk]))
        in_order = set(itertools.takewhile(applied.__contains__, soonest))
        if in_order or waiter.bytes_under_way:
            return in_order
        return set(itertools.islice(filter(applied.__contains__, soonest), 1))
