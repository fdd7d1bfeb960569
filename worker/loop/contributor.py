"""From gradients in the model to pushes: where gradients are made, what they are added to, and when they are pushed."""

from __future__ import annotations

from roundtable.common.config.batch_plan import Round, Segment, Task
from roundtable.worker.client.context import WorkerContext
from roundtable.worker.client.push_pull import ParameterClient
from roundtable.worker.contribute.contribution_pusher import ContributionPusher
from roundtable.worker.contribute.gradient_sums import GradientAccumulator, GradientSum
from roundtable.worker.contribute.push_overlap import PushOverlap
from roundtable.worker.layers.sharded_linear import ShardedLayers
from roundtable.worker.layers.sparse_embedding import RowSparse
from roundtable.worker.loop.task_queue import TaskQueue
from roundtable.worker.optim.round_settings import RoundSettings
from roundtable.worker.replica.gradient_buffers import GradientBuffer, GradientBuffers
from roundtable.worker.replica.replica import Replica

#: Keep a contribution for later ones only if micro-batches take at most this many seconds: other workers may wait for it.
_KEPT_S = 0.25


class Contributor:
    """Makes contributions from one worker's gradients, adds up those in a row, and pushes them."""

    def __init__(
        self,
        context: WorkerContext,
        client: ParameterClient,
        tasks: TaskQueue,
        replica: Replica,
        rows: RowSparse,
        shards: ShardedLayers,
        buffers: GradientBuffers,
        settings: RoundSettings,
        clip_norm: float | None,
    ) -> None:
        self._context = context
        self._client = client
        self._tasks = tasks
        self._replica = replica
        self._rows = rows
        self._round_settings = settings
        self._shards = shards
        self._buffers = buffers
        self._clip_norm = clip_norm
        self._combines = context.policy.combines
        self._per_round = context.policy.applies == "round"
        self._skips_nonfinite = context.settings.on_nonfinite == "skip"
        #: The round of the weights in the model. Servers have applied the gradient buffers of earlier rounds.
        self._round = 0
        #: Where the gradients of the current micro-batch are made; None if they are added to those of the previous one.
        self._buffer: GradientBuffer | None = None
        #: The contribution that the gradients are added to as they are made, if any.
        self._accumulate_into: GradientSum | None = None
        #: Whether the script gives weights other than samples. They are not known before `step`, so gradients are not added to
        #: others, or pushed, before that.
        self._weighs = False
        self._accumulator = GradientAccumulator(replica.layout)
        self._pusher = ContributionPusher(context, client, replica, rows, shards, settings)
        # if contributions that are not finite are skipped, servers must have all of one before any of it counts
        may_overlap = not self._skips_nonfinite and clip_norm is None
        self._overlap = PushOverlap(context, client, replica, self._pusher, self._accumulator, self._free_buffer, may_overlap)

    def prepare(self, task: Task, plan: Round, compute_s: float) -> None:
        """Prepare a free gradient buffer for a micro-batch, or have its gradients added to those of the previous micro-batch."""
        may_add = not self._weighs and self._is_added(plan, task.k)
        before = self._accumulator.before(task.round, task.k) if may_add else None
        if before is not None and self._is_pushed_early(compute_s):
            before = None
        self._accumulate_into = before
        if before is not None:
            self._buffer = None
            self._replica.add_to(before.buffer)
        else:
            self._buffer = self._free_buffer()
            self._replica.contribute_to(self._buffer)

    def overlap(self, task: Task, plan: Round, compute_s: float, versions: dict[int, int]) -> None:
        """Push the gradients of a micro-batch while backward makes them, if that saves time and all else of the push is known."""
        is_known = not self._weighs and not self._round_settings.set_before_step
        if self._buffer is not None and is_known and self._is_pushed_early(compute_s):
            self._overlap.begin(plan, task.k, self._buffer, versions)

    def take(self, task: Task, plan: Round, metrics: dict[str, float], given: float | None = None) -> tuple[int, GradientSum]:
        """Take the gradients out of the model. Return the first micro-batch of the contribution, and the contribution.

        `given` is the weight that the script gives to the micro-batch. None: its samples.
        """
        samples = plan.samples_in(task.k, task.k + 1)
        weight = float(samples) if given is None else given
        is_usual = weight == samples
        self._weighs |= not is_usual
        if self._clip_norm is not None:
            self._pusher.clip(self._clip_norm)
        sums_of_metrics = {name: (value * weight, weight) for name, value in metrics.items()} if weight else {}
        rows, uses = self._rows.contribution(weight), self._shards.contribution(weight)
        if (before := self._accumulate_into) is not None and is_usual:
            sums = self._replica.added(samples, before.sums)
            self._accumulator.remove(task.k - 1)
            return task.k - 1, before.joined(GradientSum(before.buffer, {}, rows, uses, sums_of_metrics, weight), sums)
        if before is not None:  # gradients of another weight cannot be added as they are
            self._buffer = self._free_buffer()
            self._replica.contribute_to(self._buffer)
        assert self._buffer is not None
        sums = self._replica.gradient(
            weight, without=self._overlap.confirm(is_usual and not self._round_settings.set_before_step)
        )
        contribution = GradientSum(self._buffer, sums, rows, uses, sums_of_metrics, weight)
        if self._skips_nonfinite:  # before anything is added: which micro-batches are added depends on who computes them
            contribution.finite = self._pusher.is_finite(task.round, (task.k, task.k + 1), contribution)
        return task.k, contribution

    def keep_or_push(
        self, plan: Round, span: tuple[int, int], contribution: GradientSum, compute_s: float, versions: dict[int, int]
    ) -> None:
        """Push a contribution, or keep it so that later ones are added to it."""
        k = span[1]
        is_kept = compute_s <= _KEPT_S and self._is_added(plan, k) and self._is_next(plan.index, k)
        if not self._combines or (not is_kept and self._lies_apart(contribution.buffer, plan.index)):
            self._pusher.push(plan, span, contribution, versions)
        else:
            self._accumulator.add(plan.index, plan.micro_batches, span, contribution)

    def push_held(self, segment: Segment, versions: dict[int, int]) -> None:
        """Push all contributions that were kept."""
        for round_, span, total in self._accumulator.take():
            self._pusher.push(segment.round(round_), span, total, versions)

    def give_up(self) -> None:
        """Drop the micro-batch that was computed, without a contribution."""
        self._overlap.confirm(False)
        if self._buffer is not None:
            with self._context.io.lock:
                self._buffer.taken = False
        self.forget()

    def forget(self) -> None:
        """Drop the gradients that the model holds."""
        self._replica.discard()
        self._rows.forget()
        self._shards.contribution(0)

    def go_to(self, round_: int) -> None:
        """Note that the model is in another round. Drop kept contributions, because their round was closed without them."""
        self._round = round_
        with self._context.io.lock:
            for _, _, total in self._accumulator.take():
                total.buffer.taken = False

    def _is_added(self, plan: Round, k: int) -> bool:
        """Return whether a micro-batch's gradients may be added, as they are made, to those of the previous one.

        They may if three things are true. The reduction tree adds these two together, neither is clipped or checked first, and
        neither has to be multiplied by its samples.
        """
        if k % 2 == 0 or k >= plan.micro_batches or not self._combines:
            return False
        if self._clip_norm is not None or self._skips_nonfinite:
            return False
        samples = plan.samples_in(k, k + 1)
        return samples == plan.samples_in(k - 1, k) and samples & (samples - 1) == 0

    def _is_next(self, round_: int, k: int) -> bool:
        """Return whether this worker has yet to compute that micro-batch."""
        with self._context.io.lock:
            return k in self._tasks.left(round_)

    def _lies_apart(self, buffer: GradientBuffer, round_: int) -> bool:
        """Return whether the servers add up this contribution, rather than this worker."""
        with self._context.io.lock:
            return buffer.index >= 0 and not self._client.sends_any and self._buffers.may_lie_apart(round_)

    def _is_pushed_early(self, compute_s: float) -> bool:
        """Return whether to push gradients while backward makes them, if they are sent at all."""
        if not self._overlap.pays(compute_s):
            return False
        with self._context.io.lock:
            return self._tasks.run_done or not self._combines  # otherwise more is added to the contribution

    def _free_buffer(self) -> GradientBuffer:
        """Return a buffer that no server needs any more.

        A server that applies once a round reads a buffer until it has applied it. The weights of the next round show that it has.
        """

        def is_needed(buffer: GradientBuffer) -> bool:
            return self._client.needs(buffer) or (self._per_round and buffer.pushed >= self._round)

        with self._context.io.lock:
            return self._buffers.take(is_needed)
