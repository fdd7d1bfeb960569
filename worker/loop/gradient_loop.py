"""Computing gradients for policies whose servers apply them: `sync`, `backup`, `ssp`, `async`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from roundtable.common.config.batch_plan import Segment, Task, derive_seed
from roundtable.common.model.nonfinite import ADVICE, is_finite, sentence, tensors_not_finite
from roundtable.common.model.partial_sum import Sum, adder
from roundtable.common.model.reduction_tree import TreeSum
from roundtable.common.model.sparse_rows import RowSums
from roundtable.common.protocol.effects import COORDINATOR, Send
from roundtable.common.protocol.messages.embedding import RowPush
from roundtable.common.protocol.messages.gradients import Push, Sums
from roundtable.common.protocol.messages.session import MOST_TOLD, Heartbeat, RequestWork
from roundtable.common.protocol.messages.sharded import LayerPush
from roundtable.common.protocol.transport import PATIENCE_BY_WORKER_S
from roundtable.common.runtime.allocator import keep_memory
from roundtable.common.runtime.errors import NoAnswer, UsageError
from roundtable.common.runtime.failpoints import failpoint
from roundtable.worker.data.loader import Loader, seed_everything
from roundtable.worker.layers import sharded_linear
from roundtable.worker.layers.sparse_embedding import RowSparse
from roundtable.worker.loop.repeat import LONGEST_S, Repeat, may_repeat
from roundtable.worker.optim.optimizer import Hypers
from roundtable.worker.replica.backward_overlap import OverlappedPush, TreeJoin
from roundtable.worker.replica.gradient_buffers import GradientBuffer, GradientBuffers
from roundtable.worker.replica.lazy_weights import LazyWeights
from roundtable.worker.replica.replica import Replica
from roundtable.worker.replica.script_edits import Edits

if TYPE_CHECKING:
    from roundtable.worker.run import Run

log = logging.getLogger("roundtable.worker.rounds")

#: A waiting worker asks for more work after this long, seconds, or half a micro-batch's time if that is longer.
_PATIENCE_S = 0.05
#: Weight of the newest micro-batch in the moving averages of speed.
_NEWEST = 0.2
#: A contribution is kept for the next one to be added to it where micro-batches take no longer than this, seconds: others may
#: wait for it.
_KEPT_S = 0.25

STEP_MISSING = "opt.step() was not called for a batch: every batch of run.batches() needs backward() and step()."
STEP_TOO_MUCH = "opt.step() was called without a batch: call it once for each batch of run.batches()."


@dataclass
class GradientSum:
    """The sum over some micro-batches by chunk, in a slot, of rows of tables, and of uses of sharded layers; and of the metrics,
    sums x samples, and the samples. `finite`: each of the micro-batches was, if that is looked at."""

    slot: GradientBuffer
    sums: dict[int, Sum]
    rows: RowSums
    uses: list[sharded_linear.LayerGradient | sharded_linear.HiddenGradient]
    metrics: Sums
    finite: bool = True


class Throughput:
    """How fast this worker computes: moving averages over micro-batches."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.rate = 0.0

    def measured(self, seconds: float, samples: int) -> None:
        weight = _NEWEST if self.seconds else 1.0
        self.seconds += weight * (seconds - self.seconds)
        self.rate += weight * (samples / max(seconds, 1e-9) - self.rate)


class GradientLoop:
    """One worker's loop: take a micro-batch, contribute its gradient, go on when the policy lets it."""

    def __init__(
        self,
        run: Run,
        replica: Replica,
        rows: RowSparse,
        shards: sharded_linear.ShardedLayers,
        slots: GradientBuffers,
        hypers: Hypers,
        clip_norm: float | None,
    ) -> None:
        self.replica = replica
        self._rows = rows
        self._shards = shards
        self.round = 0
        self._run = run
        self._link = run._link
        self._tasks = run._tasks
        self._policy = run._policy
        self._exchange = run._exchange
        self._hypers = hypers
        self._clip_norm = clip_norm
        self._per_round = self._policy.applies == "round"
        self._segment: Segment | None = None
        self._current: Task | None = None
        self._metrics: dict[str, float] = {}
        #: Where the gradients of the current micro-batch are made, or the contribution of the one before that they are added to.
        self._slot: GradientBuffer | None = None
        self._onto: GradientSum | None = None
        #: What was computed of the own run and is not pushed yet, and the round it belongs to.
        self._sums: TreeSum[GradientSum] | None = None
        self._sums_round = -1
        #: Versions, by server, of the weights in the model, and whether something was contributed since they came.
        self._versions: dict[int, int] = {}
        self._stale = False
        #: Which weights are not here yet; and whether they will never be, so that nothing computed in this round is of use.
        self._awaited = LazyWeights(replica, self._await)
        self._to_come: set[int] = set()
        self._spoilt = False
        #: The contribution being made, where it is pushed as it comes.
        self._early: OverlappedPush | None = None
        #: How long it takes to push one so, a moving average, seconds.
        self._overlap_s = 0.0
        self._begun_at = 0.0
        self._meter = Throughput()
        #: Of the micro-batch that is computed twice; and the parameter of which it had two gradients.
        self._repeat: Repeat | None = None
        self._unsteady = ""
        self._add = {chunk.id: adder(chunk) for chunk in replica.layout.chunks}
        self._slots = slots
        self.edits = Edits(run, replica)
        replica.catch_gradients()

    def join(self) -> None:
        """Have the servers' weights in the model, whatever was there."""
        self._go_to(self.round, fresh=True)
        self.edits.note()
        keep_memory()  # not before, for what the model was made in is given back now

    @property
    def epoch(self) -> int:
        if self._segment is None:
            return 0
        if self.round >= self._segment.end:
            return self._segment.first_epoch + self._segment.epochs
        return self._segment.round(max(self.round, self._segment.first_round)).epoch

    # ---- the loop

    def batches(self, segment: Segment, loader: Loader) -> Iterator[Any]:
        self._begin(segment)
        while (task := self._next_task()) is not None:
            batch = loader.load(task)
            self.replica.check_dtypes()
            self.replica.reset_buffers()
            self._take_slot()
            if self._is_repeated(task):
                self._repeat = Repeat(self.replica)
            else:
                self._push_early()
            yield from self._compute(task, batch)
            if self._repeat is not None:
                batch = loader.load(task)  # anew, for the script may have written to the first
                self.replica.reset_buffers()
                self._current = task
                yield from self._compute(task, batch)

    def _compute(self, task: Task, batch: Any) -> Iterator[Any]:
        """Have the script compute a micro-batch."""
        seed_everything(derive_seed(self._run.settings.seed, "micro-batch", task.round, task.k))
        self._metrics = {}
        yield batch
        if self._current is not None:
            raise UsageError(STEP_MISSING)
        self.edits.check_places()
        self._check_edits()

    def _is_repeated(self, task: Task) -> bool:
        """Whether the script is to compute a micro-batch twice: the first of a run, on one worker of several."""
        run, is_first = self._run, task.round == 0 and not self._meter.seconds
        return is_first and run.is_chief and run.settings.workers > 1 and self._per_round and may_repeat(self.replica)

    def _check_edits(self) -> None:
        if self.edits.lost():
            self._await_all()
            if not self._spoilt:
                self.edits.check(self.round if self._per_round else None)

    def _begin(self, segment: Segment) -> None:
        self._segment = segment
        with self._link.lock:
            if self.round < segment.end:
                self._tasks.open(self.round, segment.round(self.round).micro_batches)

    def log(self, numbers: dict[str, float]) -> bool:
        if self._current is not None:
            self._metrics.update(numbers)
        return self._current is not None

    def step(self) -> None:
        """Contribute the gradients that the model holds now, and wait as the policy says."""
        if self._current is None or self._segment is None:
            raise UsageError(STEP_TOO_MUCH)
        self._await_all()
        self.replica.check_dtypes()
        self.replica.check_constants()
        self._check_edits()
        task, self._current = self._current, None
        if self._repeat is not None and self._repeat.once:
            self._end_repeat()
            return
        failpoint("computing", task.round)
        self._spoilt = self._spoilt or self._shards.spoilt
        if self._spoilt:
            self._repeat = None
            self._give_up()
            return
        if self._repeat is not None:
            self._repeat.note()
        plan = self._segment.round(task.round)
        samples = plan.samples_in(task.k, task.k + 1)
        if self._clip_norm is not None:
            self._clip(self._clip_norm)
        lo, contribution = self._contribution(task, samples)
        self._meter.measured(time.monotonic() - self._begun_at, samples)
        is_kept = self._is_added(task.round, task.k + 1) and self._is_next(task.round, task.k + 1)
        if not self._policy.combines or (not is_kept and self._lies_apart(contribution.slot, task.round)):
            self._push(task.round, lo, task.k + 1, contribution)
        else:
            if self._sums is None:
                self._sums, self._sums_round = TreeSum(plan.micro_batches, self._add_up), task.round
            self._sums.file((lo, task.k + 1), contribution)
        if self._meter.seconds > LONGEST_S:
            self._repeat = None
        if self._repeat is None:
            self._advance()
        else:
            self._has_task()  # what is done of the own run is pushed, but the weights stay

    def _end_repeat(self) -> None:
        """Compare the gradients of a micro-batch that was computed twice. Nothing else comes of the second."""
        assert self._repeat is not None
        self._unsteady = self._repeat.differs() or ""
        self._repeat = None
        self.replica.discard()
        self._advance()

    def _contribution(self, task: Task, samples: int) -> tuple[int, GradientSum]:
        """What is contributed of the micro-batches from the one returned to `task`."""
        metrics = {name: (value * samples, float(samples)) for name, value in self._metrics.items()}
        rows, uses = self._rows.contribution(samples), self._shards.contribution(samples)
        if self._onto is not None:
            assert self._sums is not None
            sums = self.replica.added(samples, self._onto.sums)
            del self._sums.held[task.k - 1, task.k]
            return task.k - 1, self._joined(self._onto, GradientSum(self._onto.slot, {}, rows, uses, metrics), sums)
        assert self._slot is not None
        sums = self.replica.gradient(samples, without=self._settle())
        contribution = GradientSum(self._slot, sums, rows, uses, metrics)
        if self._run.settings.on_nonfinite == "skip":  # before anything is added, for sums depend on who computes what
            contribution.finite = self._is_finite(contribution, task.round, task.k, task.k + 1)
        return task.k, contribution

    def _is_added(self, round_: int, k: int) -> bool:
        """Whether the gradients of a micro-batch may be added, as they are made, to those of the one before: both together are in
        the tree, there is nothing to do to either first, and neither has to be multiplied by its samples."""
        assert self._segment is not None
        plan = self._segment.round(round_)
        if k % 2 == 0 or k >= plan.micro_batches or not self._policy.combines:
            return False
        if self._clip_norm is not None or self._run.settings.on_nonfinite == "skip":
            return False
        samples = plan.samples_in(k, k + 1)
        return samples == plan.samples_in(k - 1, k) and samples & (samples - 1) == 0

    def _is_next(self, round_: int, k: int) -> bool:
        """Whether this worker is about to compute that micro-batch, and soon done with it."""
        with self._link.lock:
            return k in self._tasks.left(round_) and self._meter.seconds <= _KEPT_S

    def _clip(self, norm: float) -> None:
        """Clip this micro-batch's gradient, that of rows included."""
        parts = [tensor for tensor in self.replica.trainable if tensor.grad is not None]
        for gradient in self._rows.gradients():
            rows = torch.empty_like(gradient)
            rows.grad = gradient
            parts.append(rows)
        torch.nn.utils.clip_grad_norm_(parts, norm)

    def _lies_apart(self, slot: GradientBuffer, round_: int) -> bool:
        """Whether servers are to add this contribution up, and not this worker."""
        assert self._exchange is not None
        with self._link.lock:
            return slot.index >= 0 and not self._exchange.sends_any and self._slots.may_lie_apart(round_)

    def _give_up(self) -> None:
        """Contribute nothing of this micro-batch: its round was closed before its weights were all here."""
        self._settle()
        if self._slot is not None:
            with self._link.lock:
                self._slot.taken = False
        self.replica.discard()
        self._rows.forget()
        self._shards.contribution(0)
        self._advance()

    def _take_slot(self) -> None:
        """Have the next gradients made in a slot that no server needs any more, or added to those of the micro-batch before.

        Servers that apply once a round read a slot until they have applied it, as the weights after it show.
        """
        self._onto = self._before()
        if self._onto is not None:
            self._slot = None
            self.replica.add_to(self._onto.slot)
            return
        with self._link.lock:
            self._slot = self._slots.take(self._is_needed)
        self.replica.contribute_to(self._slot)

    def _before(self) -> GradientSum | None:
        """The contribution of the micro-batch before, if that of this one is to be added to it."""
        task = self._current
        assert task is not None
        if self._sums is None or self._sums_round != task.round or not self._is_added(task.round, task.k):
            return None
        before = self._sums.held.get((task.k - 1, task.k))
        is_whole = before is not None and len(before.sums) == len(self.replica.layout.chunks)
        return before if is_whole and not self._is_pushed_early() else None

    def _is_pushed_early(self) -> bool:
        """Whether what backward makes now is to be pushed at once where it is sent."""
        assert self._exchange is not None
        if self._run.settings.on_nonfinite == "skip":
            return False  # servers must know of all of a contribution before any of it counts
        if self._clip_norm is not None or not self._exchange.sends_any:
            return False
        # on one host both take time on the same processors, so nothing is gained unless the transfer is what is waited for
        costs_s = self._overlap_s if self._exchange.sends_away else self._meter.seconds
        if self._exchange.transfer_s <= costs_s:
            return False
        with self._link.lock:
            return self._tasks.run_done or not self._policy.combines  # else more is to be added to it

    def _push_early(self) -> None:
        """Have what backward makes now pushed at once, if it is to be."""
        if self._slot is None or not self._is_pushed_early():
            return
        task = self._current
        assert task is not None and self._segment is not None and self._exchange is not None
        plan = self._segment.round(task.round)
        (lo, hi), joins = (task.k, task.k + 1), []
        held = self._sums.held if self._sums is not None else {}
        for left, right in self._sums.joins((lo, hi)) if self._sums is not None else ():
            on_left = left[0] < lo
            joins.append(TreeJoin(held[left if on_left else right].sums, on_left))
            lo, hi = left[0], right[1]
        push = self._make_push(task.round, lo, hi, None)
        exchange, link = self._exchange, self._link

        def send(chunk: int, value: Sum, slot: GradientBuffer) -> None:
            with link.lock:
                messages = exchange.push_early(push, chunk, value, time.monotonic(), self._versions, slot)
            link.send(*messages)

        self._early = OverlappedPush(
            self.replica, self._slot, plan.samples_in(task.k, task.k + 1), joins, self._spare_slot, send, exchange.sends
        )
        self.replica.on_gradient = self._early.made

    def _settle(self) -> set[int]:
        """Chunks that were pushed early and now count."""
        early, self._early, self.replica.on_gradient = self._early, None, None
        if early is None:
            return set()
        assert self._exchange is not None
        good = early.unchanged() if not self._spoilt else set()
        self._overlap_s += _NEWEST * (early.seconds - self._overlap_s)
        if self._run.settings.on_nonfinite == "fail":
            good = {chunk for chunk in good if is_finite(early.values[chunk])}  # what is not is pushed anew, and found there
        with self._link.lock:
            messages = self._exchange.settle(good, time.monotonic())
            if early.spare is not None:
                early.spare.taken = False
        self._link.send(*messages)
        return good

    def _spare_slot(self) -> GradientBuffer:
        with self._link.lock:
            return self._slots.take(self._is_needed)

    def _is_needed(self, slot: GradientBuffer) -> bool:
        assert self._exchange is not None
        return self._exchange.needs(slot) or (self._per_round and slot.pushed >= self.round)

    def _push_sums(self) -> None:
        if self._sums is not None:
            for (lo, hi), total in sorted(self._sums.held.items()):
                self._push(self._sums_round, lo, hi, total)
            self._sums = None

    def _drop_sums(self) -> None:
        """Forget what is not pushed: of a round that was closed without it."""
        if self._sums is not None:
            with self._link.lock:
                for total in self._sums.held.values():
                    total.slot.taken = False
            self._sums = None

    def _add_up(self, left: GradientSum, right: GradientSum) -> GradientSum:
        both = left.sums.keys() & right.sums.keys()  # but for chunks that were pushed early
        is_one_scale = _scale(left) == _scale(right)
        sums = {}
        for chunk in both:
            a, b = left.sums[chunk], right.sums[chunk]
            if a.is_nothing or b.is_nothing:
                sums[chunk] = _alone(b if a.is_nothing else a, left.slot.chunks[chunk], is_one_scale)
            else:
                sums[chunk] = self._add[chunk](a, b)
        right.slot.taken = False  # both are owned, so the sum is where the left one was
        return self._joined(left, right, sums)

    def _joined(self, left: GradientSum, right: GradientSum, sums: dict[int, Sum]) -> GradientSum:
        """Two contributions as one, with these sums, which lie where the left one's do."""
        metrics = dict(left.metrics)
        for name, (value, samples) in right.metrics.items():
            before = metrics.get(name, (0.0, 0.0))
            metrics[name] = before[0] + value, before[1] + samples
        rows, uses = self._rows.add(left.rows, right.rows), left.uses + right.uses
        return GradientSum(left.slot, sums, rows, uses, metrics, left.finite and right.finite)

    def _push(self, round_: int, lo: int, hi: int, contribution: GradientSum) -> None:
        assert self._exchange is not None
        if self._run.settings.on_nonfinite == "fail":
            self._is_finite(contribution, round_, lo, hi)
        push = self._make_push(round_, lo, hi, contribution.metrics, contribution.finite)
        slot = contribution.slot
        with self._link.lock:
            messages = self._exchange.push(push, contribution.sums, time.monotonic(), self._versions, slot)
            slot.taken, slot.pushed = False, round_
        self._link.send(*messages)
        rows = RowPush(round_, lo, hi, push.samples, [], hypers=push.hypers, finite=push.finite)
        self._rows.push(rows, contribution.rows, self._versions)
        classes_ = LayerPush(round_, lo, hi, push.samples, [], hypers=push.hypers, finite=push.finite)
        self._shards.push(classes_, contribution.uses, self._versions)

    def _is_finite(self, contribution: GradientSum, round_: int, lo: int, hi: int) -> bool:
        """Whether all of a contribution of micro-batches lo .. hi-1 is finite. Raises UsageError if the run is to fail then."""
        fails = self._run.settings.on_nonfinite == "fail"
        values = {chunk: total.values for chunk, total in contribution.sums.items()}
        if fails and self._per_round:  # what servers read from here they look at, on its way through their caches
            assert self._exchange is not None
            values = {chunk: one for chunk, one in values.items() if self._exchange.sends(chunk)}
        what = tensors_not_finite(self.replica.layout, values)
        others = [rows.values for rows in contribution.rows] + [part for use in contribution.uses for part in use.gradients]
        if not what and all(map(is_finite, others)):
            return True
        text = sentence(self._run.name, what or "a table or a sharded layer", round_, lo, hi)
        if fails:
            raise UsageError(f"{text}; {ADVICE}")
        log.warning("%s: it is dropped.", text)
        return False

    def _make_push(self, round_: int, lo: int, hi: int, metrics: Sums | None, finite: bool = True) -> Push:
        assert self._segment is not None
        plan = self._segment.round(round_)
        hypers = self._hypers.at(round_, plan.epoch)
        return Push(round_, lo, hi, plan.samples_in(lo, hi), hi - lo, [], [], metrics=metrics, hypers=hypers, finite=finite)

    # ---- going on

    def _next_task(self) -> Task | None:
        """The next micro-batch, with the weights to compute it from in the model; None at the segment's end."""
        while True:
            self._leave_if_asked()
            self._advance()
            if self._segment is None or self.round >= self._segment.end:
                return None
            with self._link.lock:
                task = self._tasks.next()
            if task is not None:  # else others have taken over what there was just now
                break
        if not self._per_round and self._stale:
            self._fetch(task.round, settled=False, lazy=True)
        self._current, self._begun_at = task, time.monotonic()
        self._stale = True
        self._link.beat_soon()
        return task

    def _advance(self) -> None:
        """Go from round to round until there is a micro-batch to compute, or the segment is over."""
        assert self._segment is not None
        end = self._segment.end
        while self.round < end:
            if not self._spoilt and self._has_task():
                return
            self._await_all()  # for it may yet be asked to compute something from these
            target = self.round + 1
            settled = not self._per_round and target == end
            reached = self._fetch(target, settled, unless_leased=not self._spoilt, lazy=target < end)
            if reached is not None:
                self._go_to(reached)

    def _leave_if_asked(self) -> None:
        """End the script here, between two micro-batches, where this worker is to leave."""
        if self._run.leaves:
            self._push_sums()
            self._run.left_early = True
            raise SystemExit(128 + self._run.told if self._run.told else 0)

    def _has_task(self) -> bool:
        """Whether there is a micro-batch to compute. Where nothing is left of the own run, what was computed of it is pushed:
        not only after a step, for others may have taken over the rest meanwhile."""
        assert self._segment is not None
        with self._link.lock:
            self._tasks.drop_taken(self.round if self._per_round else self._segment.first_round)
            run_done, has_task = self._tasks.run_done, self._tasks.any
        if run_done:
            self._push_sums()
        return has_task

    def _go_to(self, round_: int, fresh: bool = False) -> None:
        """Be in `round_`, whose weights the model has (or, `fresh`, gets now)."""
        if fresh:
            reached = self._fetch(round_, settled=False)
            round_ = round_ if reached is None else reached
        self._drop_sums()
        self.round, self._spoilt = round_, False
        if self._segment is not None and round_ < self._segment.end:
            with self._link.lock:
                self._tasks.open(round_, self._segment.round(round_).micro_batches)

    def _fetch(self, clock: int, settled: bool, unless_leased: bool = False, lazy: bool = False) -> int | None:
        """Pull the weights to start round `clock` from and put them into the model; the round they really are for.

        None if there was something to compute first (`unless_leased`). A waiting worker asks for something to take over.
        `lazy`: some may still be on their way when this returns, but none that anybody waits for elsewhere.
        """
        assert self._exchange is not None
        if self._exchange.clock != clock:
            with self._link.lock:
                messages = self._exchange.pull(clock, settled, time.monotonic())
            self._link.send(*messages)
        began = time.monotonic()
        lazy = lazy and self._exchange.receives
        needed = self._awaited.needed_first if lazy else set()
        self._link.beat_soon()

        def ready() -> str | None:
            assert self._exchange is not None
            if self._exchange.over is not None:
                return "gone"
            if self._exchange.complete or (lazy and self._exchange.usable(needed)):
                return "here"
            return "leased" if unless_leased and self._tasks.any else None

        while True:
            patience = max(_PATIENCE_S, PATIENCE_BY_WORKER_S * self._run.settings.workers, self._meter.seconds / 2)
            state = self._link.wait(ready, self._run.settings.progress_timeout + 20.0, self._waited_for, every=patience)
            if state is not None:
                break
            if unless_leased:
                self._leave_if_asked()
                self._link.send(Send(COORDINATOR, RequestWork(self.round)))
                self._link.beat_soon()
            if time.monotonic() - began > self._run.settings.progress_timeout + 20.0:
                raise NoAnswer(f"waited {time.monotonic() - began:.0f} s for {self._waited_for()}.")
        if state == "leased":
            return None
        if state == "gone":
            return self._fetch(self._exchange.over or 0, settled, unless_leased)  # not lazily, for that may be the end
        self._awaited.came(self._load())
        self._awaited.expect(self._to_come)
        self._stale = False
        return clock

    def _load(self) -> set[int]:
        """Put into the model what has come; the chunks."""
        assert self._exchange is not None
        with self._link.lock:
            found, self._versions = self._exchange.take()
            self._to_come = self._exchange.to_come  # now, for what comes next is not in the model yet
        self.replica.load(found, copy=False)
        return set(found)

    def _await(self, index: int) -> None:
        """Wait for the weights of tensor number `index`: something wants to use them."""
        chunks = {chunk.id for chunk in self.replica.chunks_of(index)}
        self._await_chunks(chunks)

    def _await_all(self) -> None:
        self._await_chunks({chunk.id for chunk in self.replica.layout.chunks})

    def _await_chunks(self, chunks: set[int]) -> None:
        exchange = self._exchange
        assert exchange is not None
        if not self._awaited.any:
            return
        began = time.monotonic()
        timeout = self._run.settings.progress_timeout + 20.0
        self._link.wait(lambda: exchange.gone or exchange.has(chunks), timeout, self._waited_for)
        if not exchange.has(chunks):
            self._spoilt = True  # whatever the model holds will do, for nothing comes of it
            self._awaited.give_up()
        else:
            self._awaited.came(self._load())
        self._begun_at += time.monotonic() - began  # waiting is not computing

    def _waited_for(self) -> str:
        assert self._exchange is not None
        return f"the weights {self._exchange.missing_text()}"

    def version(self) -> int | None:
        """The round whose weights are in the model, all of them; None if that round is over."""
        self._await_all()
        return None if self._spoilt else self.round

    def close(self) -> None:
        """Make the model an ordinary one, which waits for nothing."""
        self._awaited.give_up()

    def beat(self) -> Heartbeat:
        """Where this worker is. Called by the link's thread, with the lock held."""
        now = self._current
        round_ = now.round if now is not None else self.round
        sent = self._exchange.unacknowledged(round_) if self._exchange is not None else []
        sent = sorted({*sent, *self._rows.exchange.unacknowledged(round_), *self._shards.exchange.unacknowledged(round_)})
        at, state = (now.k, "computing") if now is not None else (-1, "waiting")
        transfer = self._exchange.transfer_s if self._exchange is not None else 0.0
        return Heartbeat(
            state, round_, at, self._tasks.left(round_)[:MOST_TOLD], sent[:MOST_TOLD],  # type: ignore[arg-type]
            self._meter.seconds, self._meter.rate, transfer, reached=self.round,
            reassigned_here=self._tasks.taken_elsewhere(round_)[:MOST_TOLD], unsteady=self._unsteady,
        )  # fmt: skip


def _scale(contribution: GradientSum) -> float:
    """What a contribution's values are to be multiplied by."""
    return max((total.scale for total in contribution.sums.values()), default=1.0)


def _alone(total: Sum, out: torch.Tensor, keeps_scale: bool) -> Sum:
    """A sum to which the other half of a contribution adds nothing, in `out`, with the scale of the others."""
    if total.is_nothing:
        return total
    if total.values.data_ptr() != out.data_ptr():
        out.copy_(total.values)
    if not keeps_scale and total.scale != 1.0:
        out.mul_(total.scale)
    return Sum(out, total.present, owned=True, scale=total.scale if keeps_scale else 1.0)
