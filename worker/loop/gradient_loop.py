"""The worker's loop for policies whose servers apply gradients: `sync`, `backup`, `ssp`, `async`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from roundtable.common.config.batch_plan import Round, Segment, Task, derive_seed
from roundtable.common.protocol.effects import COORDINATOR, Send
from roundtable.common.protocol.messages.session import MOST_MICRO_BATCHES, Heartbeat, RequestWork
from roundtable.common.runtime.allocator import keep_memory
from roundtable.common.runtime.errors import script_line
from roundtable.common.runtime.failpoints import failpoint
from roundtable.worker.client.context import WorkerContext
from roundtable.worker.client.push_pull import ParameterClient
from roundtable.worker.data.loader import Loader, seed_everything
from roundtable.worker.layers.sharded_linear import ShardedLayers
from roundtable.worker.layers.sparse_embedding import RowSparse
from roundtable.worker.loop.contributor import Contributor
from roundtable.worker.loop.departure import Departure
from roundtable.worker.loop.repeat import LONGEST_S, Repeat, may_repeat
from roundtable.worker.loop.script_batch import RoundHooks, ScriptBatch, data_epoch
from roundtable.worker.loop.script_edits import Edits
from roundtable.worker.loop.task_queue import TaskQueue
from roundtable.worker.loop.throughput import Throughput
from roundtable.worker.loop.weight_fetcher import WeightFetcher
from roundtable.worker.optim.round_settings import RoundSettings
from roundtable.worker.replica.replica import Replica


class GradientLoop:
    """One worker's loop: take a micro-batch, contribute its gradient, and go on when the policy allows it."""

    def __init__(
        self,
        context: WorkerContext,
        client: ParameterClient,
        tasks: TaskQueue,
        departure: Departure,
        replica: Replica,
        rows: RowSparse,
        shards: ShardedLayers,
        contributor: Contributor,
        settings: RoundSettings,
    ) -> None:
        self.replica = replica
        self.round = 0
        self.batch = ScriptBatch()
        self.hooks = RoundHooks()
        self.edits = Edits(context, client, replica)
        self._context = context
        self._client = client
        self._tasks = tasks
        self._departure = departure
        self._rows = rows
        self._shards = shards
        self._per_round = context.policy.applies == "round"
        #: None before the first loop over batches.
        self._segment: Segment | None = None
        #: Whether this worker has started a micro-batch since it fetched the weights in the model.
        self._stale = False
        self._begun_at = 0.0
        self._throughput = Throughput()
        self._contributor = contributor
        self._settings = settings
        self._weights = WeightFetcher(context, client, replica, self._throughput)
        #: The micro-batch that is computed twice, if any.
        self._repeat: Repeat | None = None
        #: The name of the parameter whose second gradient was different; '' if there is none.
        self._unsteady = ""
        replica.catch_gradients()

    def join(self) -> None:
        """Put the servers' weights into the model."""
        reached = self._weights.fetch(self.round)
        self._stale = False
        self._go_to(self.round if reached is None else reached)
        self.hooks.begin(self.round)
        self.edits.note()
        keep_memory()  # not before: the memory in which the model was made is given back now

    @property
    def epoch(self) -> int:
        """The data epoch that the current round belongs to; after the last round, the number of epochs done."""
        return data_epoch(self._segment, self.round)

    @property
    def updates(self) -> int:
        """The updates that the weights in the model have had."""
        return self.round

    @property
    def updates_at_least(self) -> int:
        """The updates that the run must have if this worker asks for its end."""
        return self.round

    def _end(self, segment: Segment) -> int:
        """Return the round before which the loop ends: the segment's end, or that of the run if a script has asked for one."""
        ends_after = self._departure.ends_after
        return segment.end if ends_after is None else min(segment.end, ends_after)

    # ---- the loop

    def batches(self, segment: Segment, loader: Loader) -> Iterator[Any]:
        """Yield this worker's micro-batches of a segment, each with the weights to compute it from in the model."""
        if self._segment is None or not self._departure.is_end(segment.first_round):
            self._segment = segment
        with self._context.io.lock:
            if self.round < self._end(segment):
                self._tasks.open(self.round, segment.round(self.round).micro_batches)
        self._settings.enter(script_line())
        while (task := self._next_task(segment)) is not None:
            batch = loader.load(task)
            self.replica.check_dtypes()
            self.replica.reset_buffers()
            plan, compute_s = segment.round(task.round), self._throughput.seconds
            while not self._settings.begin(task.round, plan.epoch):
                self._contributor.prepare(task, plan, compute_s)
                yield from self._compute(task, batch)
                batch = loader.load(task)  # again, because the script may have written to the first one
                self.replica.reset_buffers()
            self._contributor.prepare(task, plan, compute_s)
            if self._is_repeated(task):
                self._repeat = Repeat(self.replica)
            else:
                self._contributor.overlap(task, plan, compute_s, self._weights.versions)
            yield from self._compute(task, batch)
            if self._repeat is not None:
                batch = loader.load(task)
                self.replica.reset_buffers()
                self._settings.begin(task.round, plan.epoch)
                yield from self._compute(task, batch)
        self._settings.leave(segment, self.round)
        if self._departure.is_end(self.round):
            self._weights.await_all()
            self.replica.reset_buffers()

    def _compute(self, task: Task, batch: Any) -> Iterator[Any]:
        """Have the script compute a micro-batch."""
        seed_everything(derive_seed(self._context.settings.seed, "micro-batch", task.round, task.k))
        self.batch.hand_out(task)
        yield batch
        self.batch.check_computed()
        self.edits.check_places()
        self._check_edits()

    def _is_repeated(self, task: Task) -> bool:
        """Return whether the script computes this micro-batch twice: the first of a run, on one worker of several."""
        is_first = task.round == 0 and not self._throughput.seconds
        is_one_of_several = self._tasks.is_chief and self._context.settings.workers > 1
        return is_first and is_one_of_several and self._per_round and may_repeat(self.replica)

    def _check_edits(self, who: str = "the script") -> None:
        if self.edits.lost():
            self._weights.await_all()
            if not self._weights.round_invalid:
                self.edits.check(self.round, self.round if self._per_round else None, who)

    def step(self, weight: float | None = None) -> None:
        """Contribute the gradients that the model holds now, and wait as the policy requires.

        `weight` is the micro-batch's weight in the mean of the round. None: its samples.
        """
        task, segment = self.batch.in_hand, self._segment
        assert segment is not None
        self._weights.await_all()
        self.replica.check_dtypes()
        self.replica.check_constants()
        self._check_edits()
        self._settings.used(task.round)
        self.batch.take_back()
        if self._settings.rehearses:
            self._contributor.give_up()
            return
        if self._repeat is not None and self._repeat.once:
            self._end_repeat(segment)
            return
        failpoint("computing", task.round)
        self._weights.round_invalid |= self._shards.round_invalid
        if self._weights.round_invalid or task.round >= self._end(segment):
            self._repeat = None
            self._give_up(segment)
            return
        if self._repeat is not None:
            self._repeat.note()
        self._contribute(task, segment.round(task.round), weight)
        if self._throughput.seconds > LONGEST_S:
            self._repeat = None
        if self._repeat is None:
            self._advance(segment)
        else:
            self._push_finished(segment)  # the weights stay: the script computes the micro-batch again

    def _contribute(self, task: Task, plan: Round, weight: float | None) -> None:
        """Push the gradients of a micro-batch, or keep them so that later ones are added to them."""
        lo, contribution = self._contributor.take(task, plan, self.batch.metrics, weight)
        seconds = time.monotonic() - self._begun_at - self._weights.waited_s
        self._throughput.measured(seconds, plan.samples_in(task.k, task.k + 1))
        span, compute_s = (lo, task.k + 1), self._throughput.seconds
        self._contributor.keep_or_push(plan, span, contribution, compute_s, self._weights.versions)

    def _end_repeat(self, segment: Segment) -> None:
        """Compare the gradients of a micro-batch that was computed twice. The second ones are dropped."""
        assert self._repeat is not None
        self._unsteady = self._repeat.differs() or ""
        self._repeat = None
        self.replica.discard()
        self._advance(segment)

    def _give_up(self, segment: Segment) -> None:
        """Drop this micro-batch, because its round was closed before all its weights were here, or the run ends before it."""
        self._contributor.give_up()
        self._advance(segment)

    # ---- going on

    def _push_finished(self, segment: Segment) -> bool:
        """Push what was kept if this worker's own run is finished, and return whether there is a micro-batch to compute.

        Others may have taken over the rest of the run, so this is also called between steps. Both answers come from one look at
        the queue. If others take over the last micro-batch afterwards, the next look pushes what was kept.
        """
        with self._context.io.lock:
            self._tasks.drop_taken(self.round if self._per_round else segment.first_round)
            run_done, has_task = self._tasks.run_done, self._tasks.any
        if run_done:
            self._contributor.push_held(segment, self._weights.versions)
        return has_task

    def _next_task(self, segment: Segment) -> Task | None:
        """Return the next micro-batch, with its weights in the model. Return None at the segment's end."""
        task = None
        while task is None:  # others may have taken over the micro-batch that was here just now
            self._leave_if_asked(segment)
            self._advance(segment)
            while self.hooks.due(self.round):
                self._end_round()
                self._advance(segment)
            if self.round >= self._end(segment):
                return None
            with self._context.io.lock:
                task = self._tasks.next()
        if not self._per_round and self._stale:
            self._weights.fetch(task.round, lazy=True)
        self.batch.hand_out(task)
        self._begun_at, self._weights.waited_s = time.monotonic(), 0.0
        self._stale = True
        self._context.io.heartbeat_soon()
        return task

    def _advance(self, segment: Segment) -> None:
        """Go from round to round until there is something to do for the script, or the segment is over."""
        while self.round < self._end(segment) and not self.hooks.due(self.round):
            if not self._weights.round_invalid and self._push_finished(segment):
                return
            self._weights.await_all()  # this worker may yet be asked to compute something from these weights
            target = self.round + 1
            is_last = target == self._end(segment)
            after_all_updates, lazy = is_last and not self._per_round, not is_last and not self.hooks.functions
            if self._weights.round_invalid:
                reached = self._weights.fetch(target, after_all_updates, lazy)
            else:
                ask = lambda: self._ask_for_work(segment)  # noqa: E731
                has_news = lambda: self._tasks.any or self._departure.is_end(self.round)  # noqa: E731
                reached = self._weights.fetch(target, after_all_updates, lazy, has_news, ask)
            if reached is not None:
                self._stale = False
                self._go_to(reached)

    def _end_round(self) -> None:
        """Call the script's functions for the end of a round, with all its weights in the model."""
        self._weights.await_all()
        if self._per_round and not self._weights.secure(self.round):
            self.hooks.miss(self.round)
            return
        self.replica.reset_buffers()
        self._settings.end_round(self.round)
        self.hooks.call(self.round, self._check_edits)
        self.replica.reset_buffers()
        self._contributor.forget()

    def _ask_for_work(self, segment: Segment) -> None:
        """Ask the coordinator for a micro-batch, because this worker waits."""
        self._leave_if_asked(segment)
        self._context.io.send(Send(COORDINATOR, RequestWork(self.round)))
        self._context.io.heartbeat_soon()

    def _leave_if_asked(self, segment: Segment) -> None:
        """End the script here, between two micro-batches, if this worker was asked to leave."""
        if self._departure.requested:
            self._contributor.push_held(segment, self._weights.versions)
            self._departure.early = True
            number = self._context.io.stop_signal
            raise SystemExit(128 + number if number else 0)

    def _go_to(self, round_: int) -> None:
        """Enter `round_`, whose weights are in the model."""
        self._contributor.go_to(round_)
        self.round, self._weights.round_invalid = round_, False
        if self._segment is not None and round_ < self._segment.end:
            with self._context.io.lock:
                self._tasks.open(round_, self._segment.round(round_).micro_batches)

    # ---- for others

    def version(self) -> int | None:
        """Return the round whose weights are in the model, once they are complete. Return None if that round is over."""
        self._weights.await_all()
        return None if self._weights.round_invalid else self.round

    def close(self) -> None:
        """Make the model an ordinary one that waits for nothing."""
        self._weights.close()

    def heartbeat(self) -> Heartbeat:
        """Return what this worker is doing. The I/O thread calls this with the lock held."""
        now = self.batch.task
        round_ = now.round if now is not None else self.round
        sent = {*self._client.unacknowledged(round_)}
        sent |= {*self._rows.client.unacknowledged(round_), *self._shards.client.unacknowledged(round_)}
        at, state = (now.k, "computing") if now is not None else (-1, "waiting")
        return Heartbeat(
            state, round_, at, self._tasks.left(round_)[:MOST_MICRO_BATCHES], sorted(sent)[:MOST_MICRO_BATCHES],  # type: ignore[arg-type]
            self._throughput.seconds, self._throughput.rate, self._client.transfer_s, reached=self.round,
            reassigned_here=self._tasks.taken_elsewhere(round_)[:MOST_MICRO_BATCHES], unsteady=self._unsteady,
        )  # fmt: skip
