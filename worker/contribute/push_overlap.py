"""When to push gradients while backward is still making the rest of them."""

from __future__ import annotations

import time
from collections.abc import Callable

from roundtable.common.config.batch_plan import Round
from roundtable.common.model.nonfinite import is_finite
from roundtable.common.model.partial_sum import Sum
from roundtable.worker.client.context import WorkerContext
from roundtable.worker.client.push_pull import ParameterClient
from roundtable.worker.contribute.backward_overlap import OverlappedPush
from roundtable.worker.contribute.contribution_pusher import ContributionPusher
from roundtable.worker.contribute.gradient_sums import GradientAccumulator
from roundtable.worker.replica.gradient_buffers import GradientBuffer
from roundtable.worker.replica.replica import Replica

#: Weight of the newest push in the moving average of the cost.
_NEWEST = 0.2


class PushOverlap:
    """One worker's pushes during backward. They count once `confirm` has found that the script left the gradients alone."""

    def __init__(
        self,
        context: WorkerContext,
        client: ParameterClient,
        replica: Replica,
        pusher: ContributionPusher,
        accumulator: GradientAccumulator,
        take_buffer: Callable[[], GradientBuffer],
        is_possible: bool,
    ) -> None:
        """`is_possible`: a part of a contribution may be sent before the rest is known."""
        self._context = context
        self._client = client
        self._replica = replica
        self._pusher = pusher
        self._accumulator = accumulator
        self._take_buffer = take_buffer
        self._is_possible = is_possible
        #: The contribution that is being made and pushed, if any.
        self._early: OverlappedPush | None = None
        #: Seconds that the training thread spends on one such push: a moving average.
        self._cost_s = 0.0

    def pays(self, compute_s: float) -> bool:
        """Return whether pushing during backward is possible and saves time, if a micro-batch takes `compute_s` seconds."""
        if not self._is_possible or not self._client.sends_any:
            return False
        # on one host both use the same processors, so this pays only if the worker waits for the transfer
        return self._client.transfer_s > (self._cost_s if self._client.sends_away else compute_s)

    def begin(self, plan: Round, k: int, buffer: GradientBuffer, versions: dict[int, int]) -> None:
        """Push the gradients of micro-batch `k` in `buffer` while backward makes them."""
        span, joins = self._accumulator.joins(k)
        header = self._pusher.header(plan, span, None)
        client, io = self._client, self._context.io

        def send(chunk: int, value: Sum, lies_in: GradientBuffer) -> None:
            with io.lock:
                messages = client.push_early(header, chunk, value, time.monotonic(), versions, lies_in)
            io.send(*messages)

        samples = plan.samples_in(k, k + 1)
        self._early = OverlappedPush(self._replica, buffer, samples, joins, self._take_buffer, send, client.sends)
        self._replica.capture.on_gradient = self._early.made

    def confirm(self, is_of_use: bool) -> set[int]:
        """End the early pushes of a micro-batch.

        Return the chunks whose pushes count: none unless the micro-batch `is_of_use`.
        """
        early, self._early, self._replica.capture.on_gradient = self._early, None, None
        if early is None:
            return set()
        good = early.unchanged() if is_of_use else set()
        self._cost_s += _NEWEST * (early.seconds - self._cost_s)
        if self._context.settings.on_nonfinite == "fail":
            good = {chunk for chunk in good if is_finite(early.values[chunk])}  # the others are pushed again, and found there
        with self._context.io.lock:
            messages = self._client.confirm(good, time.monotonic())
            if early.spare is not None:
                early.spare.taken = False
        self._context.io.send(*messages)
        return good
