"""Pushing contributions: to parameters, to embedding rows and to sharded layers."""

from __future__ import annotations

import logging
import time

import torch

from roundtable.common.config.batch_plan import Round
from roundtable.common.config.weights import weight_if_given
from roundtable.common.model.nonfinite import ADVICE, is_finite, sentence, tensors_not_finite
from roundtable.common.protocol.messages.embedding import RowPush
from roundtable.common.protocol.messages.gradients import Push, Sums
from roundtable.common.protocol.messages.sharded import LayerPush
from roundtable.common.runtime.errors import UsageError
from roundtable.worker.client.context import WorkerContext
from roundtable.worker.client.push_pull import ParameterClient
from roundtable.worker.contribute.gradient_sums import GradientSum, Span
from roundtable.worker.layers.sharded_linear import ShardedLayers
from roundtable.worker.layers.sparse_embedding import RowSparse
from roundtable.worker.optim.round_settings import RoundSettings
from roundtable.worker.replica.replica import Replica

log = logging.getLogger("roundtable.worker.rounds")


class ContributionPusher:
    """Sends a contribution to all servers that it concerns."""

    def __init__(
        self,
        context: WorkerContext,
        client: ParameterClient,
        replica: Replica,
        rows: RowSparse,
        shards: ShardedLayers,
        settings: RoundSettings,
    ) -> None:
        self._context = context
        self._client = client
        self._replica = replica
        self._rows = rows
        self._shards = shards
        self._settings = settings
        self._on_nonfinite = context.settings.on_nonfinite

    def header(self, plan: Round, span: Span, metrics: Sums | None, finite: bool = True, weight: float | None = None) -> Push:
        """Return the message parts that all pushes of a contribution of micro-batches `span` share."""
        lo, hi = span
        samples, hypers = plan.samples_in(lo, hi), self._settings.at(plan.index, plan.epoch)
        told = weight_if_given(weight, samples)
        return Push(
            plan.index, lo, hi, samples, hi - lo, [], [], metrics=metrics, hypers=hypers, finite=finite, weight=told,
            schedules=self._settings.schedules(plan.index),
        )  # fmt: skip

    def push(self, plan: Round, span: Span, contribution: GradientSum, versions: dict[int, int]) -> None:
        """Push a contribution to all servers. `versions` are those of the weights that it was computed from, by server."""
        if self._on_nonfinite == "fail":
            self.is_finite(plan.index, span, contribution)
        header = self.header(plan, span, contribution.metrics, contribution.finite, contribution.weight)
        buffer = contribution.buffer
        with self._context.io.lock:
            messages = self._client.push(header, contribution.sums, time.monotonic(), versions, buffer)
            buffer.taken, buffer.pushed = False, plan.index
        self._context.io.send(*messages)
        common = (plan.index, *span, header.samples)
        rows = RowPush(*common, [], hypers=header.hypers, finite=header.finite, weight=header.weight)
        self._rows.push(rows, contribution.rows, versions)
        layers = LayerPush(*common, [], hypers=header.hypers, finite=header.finite, weight=header.weight)
        self._shards.push(layers, contribution.uses, versions)

    def is_finite(self, round_: int, span: Span, contribution: GradientSum) -> bool:
        """Return whether a contribution is finite. Raises UsageError if it is not and the run must fail then."""
        fails = self._on_nonfinite == "fail"
        values = {chunk: total.values for chunk, total in contribution.sums.items()}
        if fails and self._context.policy.applies == "round":  # servers check the values that they read in this worker's memory
            values = {chunk: one for chunk, one in values.items() if self._client.sends(chunk)}
        what = tensors_not_finite(self._replica.layout, values)
        others = [rows.values for rows in contribution.rows] + [part for use in contribution.uses for part in use.gradients]
        if not what and all(map(is_finite, others)):
            return True
        text = sentence(self._context.name, what or "a table or a sharded layer", round_, *span)
        if fails:
            raise UsageError(f"{text}; {ADVICE}")
        log.warning("%s: it is dropped.", text)
        return False

    def clip(self, norm: float) -> None:
        """Clip the gradient of a micro-batch, including that of embedding rows."""
        parts = [tensor for tensor in self._replica.trainable if tensor.grad is not None]
        for gradient in self._rows.gradients():
            rows = torch.empty_like(gradient)
            rows.grad = gradient
            parts.append(rows)
        torch.nn.utils.clip_grad_norm_(parts, norm)
