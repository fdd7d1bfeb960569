"""The worker's loop for policies that train replicas apart and merge them now and then: `local`, `average`."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from roundtable.common.config.batch_plan import Round, Segment, Task, derive_seed
from roundtable.common.model.metrics import add_metrics
from roundtable.common.model.partial_sum import Sum, is_mean, nothing
from roundtable.common.model.tensor_bytes import to_frame
from roundtable.common.protocol.messages.gradients import Push, Sums
from roundtable.common.protocol.messages.session import Heartbeat
from roundtable.common.runtime.errors import UsageError, script_line
from roundtable.worker.client.context import WorkerContext
from roundtable.worker.client.kv_client import KvClient
from roundtable.worker.client.push_pull import ParameterClient
from roundtable.worker.data.loader import Loader, seed_everything
from roundtable.worker.loop.departure import Departure
from roundtable.worker.loop.script_batch import RoundHooks, ScriptBatch, data_epoch
from roundtable.worker.loop.script_edits import Edits
from roundtable.worker.loop.task_queue import TaskQueue
from roundtable.worker.loop.throughput import Throughput
from roundtable.worker.merge import constraints
from roundtable.worker.merge.greedy_soup import GreedySoup
from roundtable.worker.optim.inner_optimizer import InnerOptimizer
from roundtable.worker.replica.replica import Replica

UNJUDGED = (
    "merge is greedy, but no function says which of two models is better: call run.merge_by(evaluate) before run.batches()."
)


@dataclass
class MergeHooks:
    """The functions of a script and its run that merges call. A script may set them after it has made its optimizer."""

    #: Called before each merge.
    before_merge: list[Callable[[], None]]
    #: Makes the client of the key-value store, through which workers agree on a greedy merge.
    kv: Callable[[], KvClient]
    #: Reports metrics.
    log: Callable[[dict[str, float]], None]
    #: Returns the score of a model. More is better.
    evaluate: Callable[[nn.Module], float] | None = None


class LocalSgdLoop:
    """One worker's loop: a step on its own run of micro-batches in each round, and from time to time a merge of all replicas.

    The policy says how many rounds lie between merges. One more merge ends the data. Shares are fixed, because a replica's state
    cannot be handed over to another worker.
    """

    def __init__(
        self,
        context: WorkerContext,
        client: ParameterClient,
        tasks: TaskQueue,
        departure: Departure,
        replica: Replica,
        inner: InnerOptimizer,
        script: MergeHooks,
    ) -> None:
        self.replica = replica
        self.round = 0
        self.batch = ScriptBatch()
        self.hooks = RoundHooks()
        self.edits = Edits(context, client, replica, only_frozen=True)
        self._context = context
        self._client = client
        self._tasks = tasks
        self._departure = departure
        self._policy = context.policy
        self._script = script
        self._inner = inner
        self._merge_by = context.settings.average_weights_by if self._policy.contributes == "weights" else "samples"
        self._segment: Segment | None = None
        #: Merges done. This is the version of the weights.
        self._merges = 0
        #: Merges of all segments so far, including those to come, and merges of the segments before the newest.
        self._planned = self._merged_before = 0
        #: By chunk: the weights from which a contributed change is counted. If replicas contribute weights, only chunks that were
        #: frozen at first are here, because other workers may have them frozen still.
        self._start: dict[int, torch.Tensor] = {}
        #: Samples computed since the last merge.
        self._samples = 0
        #: Micro-batches computed since the last merge.
        self._micro_batches = 0
        #: The weight of the steps since the last merge.
        self._weight = 0.0
        #: By round since the last merge: sums of metrics x weight, and the weight in each sum.
        self._logged: deque[tuple[int, Sums]] = deque()
        #: In this round: the samples.
        self._round_samples = 0
        self._begun_at = 0.0
        self._throughput = Throughput()

    def join(self) -> None:
        """Put the merged weights into the model."""
        self._load(self._merges)
        self.edits.note()

    @property
    def epoch(self) -> int:
        """The data epoch that the current round belongs to; after the last round, the number of epochs done."""
        return data_epoch(self._segment, self.round)

    @property
    def updates(self) -> int:
        """The updates that the weights in the model have had: merges."""
        return self._merges

    @property
    def has_stepped(self) -> bool:
        """Whether this worker has computed something since the last merge."""
        return self._micro_batches > 0

    @property
    def updates_at_least(self) -> int:
        """The updates that the run must have if this worker asks for its end."""
        return self._merges + self.has_stepped

    def batches(self, segment: Segment, loader: Loader) -> Iterator[Any]:
        if self._merge_by == "greedy" and self._script.evaluate is None:
            raise UsageError(UNJUDGED)
        if self._departure.is_end(self._planned):
            return
        self._segment = segment
        self._inner.settings.enter(script_line())
        for index in range(self._first(segment), segment.end):
            self.round = index
            plan = segment.round(index)
            yield from self._compute(plan, loader)
            if self._departure.is_end(self._merges):
                break
            self._step_inner()
            self._inner.step_schedule(index + 1 == segment.end or segment.round(index + 1).epoch != plan.epoch)
            self.round, merges = index + 1, self._merges
            if self.round - segment.first_round == self._policy.rounds_in(segment, self._merges - self._merged_before + 1):
                self._merge()
            goes_back = self._merges <= merges and self._departure.is_end(merges)
            if self.hooks.functions and not goes_back:
                self._end_round()
        self._inner.settings.leave(segment, self.round)
        if self._departure.is_end(self._merges):
            self._go_back(segment)

    def _compute(self, plan: Round, loader: Loader) -> Iterator[Any]:
        """Have the script compute this worker's micro-batches of a round, unless the run has ended."""
        for k in self._tasks.tables[0].run(self._context.name, plan.micro_batches):
            if self._departure.is_end(self._merges):
                return
            task = Task(plan.index, k)
            while not self._inner.settings.begin(plan.index, plan.epoch):
                yield from self._hand_out(task, loader)
            yield from self._hand_out(task, loader)

    def _hand_out(self, task: Task, loader: Loader) -> Iterator[Any]:
        batch = loader.load(task)
        seed_everything(derive_seed(self._context.settings.seed, "micro-batch", task.round, task.k))
        self.batch.hand_out(task)
        self._begun_at = time.monotonic()
        yield batch
        self.batch.check_computed()
        self.edits.check_places()
        self.edits.check(self.round, self._merges)

    def _end_round(self) -> None:
        """Call the script's functions for the end of a round, which is that of an own step and of a merge after it."""
        self._inner.settings.end_round(self.round)
        self.hooks.call(self.round, functools.partial(self.edits.check, self.round, self._merges))
        self.replica.discard()

    def _go_back(self, segment: Segment) -> None:
        """Go back to the last merge, as the run ends with it, and leave out what this worker has done since."""
        if self.has_stepped:
            self._inner.discard()
            self._forget_steps()
            self._load_again(self._merges)
        self.round = segment.first_round + self._policy.rounds_in(segment, self._merges - self._merged_before)

    def _first(self, segment: Segment) -> int:
        """Return the round of `segment` to start at. The weights of a resumed run may include earlier rounds of the segment.

        No checkpoint holds the inner optimizer's own state, so that starts again; its schedule continues.
        """
        self._merged_before, self._planned = self._planned, self._planned + self._policy.updates(segment)
        first = segment.first_round + self._policy.rounds_in(segment, max(0, self._merges - self._merged_before))
        for index in range(segment.first_round, first):
            self._inner.step_schedule(index + 1 == segment.end or segment.round(index + 1).epoch != segment.round(index).epoch)
        self.round = first
        self.hooks.begin(first)
        return first

    def step(self, weight: float | None = None) -> None:
        """Keep the gradients of this micro-batch. The inner optimizer steps after the round's last one.

        `weight` is the micro-batch's weight in the mean of this worker's part of the round, and is added to the replica's weight
        in the next merge. None: its samples.
        """
        task, segment = self.batch.in_hand, self._segment
        assert segment is not None
        self.replica.check_dtypes()
        self.replica.check_constants()
        self.edits.check(self.round, self._merges)
        self._inner.settings.used(task.round)
        self.batch.take_back()
        if self._inner.settings.rehearses:
            self.replica.discard()
            return
        samples = segment.round(task.round).samples_in(task.k, task.k + 1)
        self._samples += samples
        self._micro_batches += 1
        self._round_samples += samples
        self._take(task, float(samples) if weight is None else weight)
        self._throughput.measured(time.monotonic() - self._begun_at, samples)

    def _take(self, task: Task, weight: float) -> None:
        """Take gradients and metrics times the weight of their micro-batch; nothing if that is 0, as they may not be finite."""
        if not weight:
            self.replica.discard()
            return
        if thawed := self.replica.thawed():
            self._start |= self.replica.weights(thawed)
        metrics = self.batch.metrics
        self._inner.take(self.replica.trainable, weight, metrics.get("loss"))
        self._keep(task.round, {name: (value * weight, weight) for name, value in metrics.items()})

    def _keep(self, round_: int, sums: Sums) -> None:
        """Keep a micro-batch's metrics until the merge. If the only merge is at the end, keep one data epoch's metrics."""
        assert self._segment is not None
        self._logged.append((round_, sums))
        while self._policy.contributes == "weights" and self._logged[0][0] <= round_ - self._segment.rounds_per_epoch:
            self._logged.popleft()

    def _kept_metrics(self) -> Sums:
        """Return the sums of the metrics that are kept."""
        assert self._segment is not None
        first = self._segment.end - self._segment.rounds_per_epoch if self._policy.contributes == "weights" else 0
        none: Sums = {}
        return functools.reduce(add_metrics, (sums for round_, sums in self._logged if round_ >= first), none)

    def _step_inner(self) -> None:
        samples, self._round_samples = self._round_samples, 0
        whose = f"{self._context.name}'s gradient in round {self.round}"
        weight = self._inner.step(self.round, self._context.settings.on_nonfinite, whose)
        if weight is None:
            self._samples -= samples
        else:
            self._weight += weight

    def _forget_steps(self) -> None:
        """Count from the last merge again."""
        self._samples, self._micro_batches, self._weight = 0, 0, 0.0
        self._logged.clear()

    def _merge(self) -> None:
        """Contribute this replica, and continue from the merged one."""
        for callback in self._script.before_merge:
            callback()
        values = self.replica.weights()
        present = self.replica.present(values)
        added = {c.id: self.replica.added_to(c, values[c.id]) for c in self.replica.layout.chunks if c.kind == "sum"}
        weight = self._weigh(values)
        counts = weight > 0 or (self._merge_by != "greedy" and self._samples > 0)
        values |= added
        for chunk in [chunk for chunk in self.replica.layout.chunks if chunk.id in values]:
            if chunk.id in self._start and chunk.kind == "param":
                change = values[chunk.id].sub_(self._start[chunk.id])
                values[chunk.id] = change.neg_() if self._policy.contributes == "delta" else change
            if chunk.kind == "last":
                present[chunk.id] = present[chunk.id] if counts else 0
            elif chunk.kind != "max" and not (weight if is_mean(chunk.kind) else counts):  # 0 x NaN would be NaN
                values[chunk.id] = torch.zeros_like(values[chunk.id])
            elif is_mean(chunk.kind):
                values[chunk.id].mul_(weight)
        me = self._context.index
        push = Push(
            self._merges, me, me + 1, self._samples, self._micro_batches, [], [], metrics=self._kept_metrics(),
            hypers=[self._policy.outer_settings(self.round)] * self._inner.groups, weight=weight,
        )  # fmt: skip
        sums = {c.id: Sum(values[c.id], present[c.id]) if c.id in values else nothing() for c in self.replica.layout.chunks}
        with self._context.io.lock:
            messages = self._client.push(push, sums, time.monotonic())
        self._context.io.send(*messages)
        self._forget_steps()
        self._merges += 1
        self._load(self._merges)

    def _weigh(self, values: dict[int, torch.Tensor]) -> float:
        """Return the weight in the next merge of this replica, whose parameters are `values`."""
        if self._merge_by == "greedy":
            evaluate = self._script.evaluate
            assert evaluate is not None
            values = values | self.replica.frozen_weights()  # other workers may have trained these
            score = lambda: evaluate(self.replica.model)  # noqa: E731
            kv, is_chief, log_ = self._script.kv(), self._tasks.is_chief, self._script.log
            return GreedySoup(self._context, kv, is_chief, self.replica, score, log_, self._merges).weight(values)
        return min(1, self._samples) if self._merge_by == "uniform" else self._weight

    def _load(self, version: int) -> None:
        """Wait for the merged weights number `version`, and put them into the model."""
        client, io = self._client, self._context.io
        with io.lock:
            messages = client.pull(version, False, time.monotonic())
        io.send(*messages)

        def is_left_out() -> bool:
            return self._departure.is_end(version - 1)

        self._context.wait(lambda: client.complete or client.over is not None or is_left_out(), self._waited_for)
        if not client.complete and is_left_out():  # the run ends before that merge
            self._merges = self._departure.ends_after or 0
            self._load_again(self._merges)
            return
        if client.over is not None:  # the run was resumed from a checkpoint
            self._merges = client.over
            self._load(self._merges)
            return
        with io.lock:
            frames, _ = client.take()
        self.replica.load(frames)
        if version:
            constraints.put_back(self.replica.model)
        known = None if self._policy.contributes == "delta" else [self.replica.layout.chunks[chunk] for chunk in self._start]
        self._start = self.replica.weights(known)

    def _load_again(self, version: int) -> None:
        """Load the merged weights `version`, from which this worker has stepped on. Servers may not have what it has unfrozen."""
        self.replica.load({chunk: to_frame(values) for chunk, values in self._start.items()})
        self._load(version)

    def _waited_for(self) -> str:
        return f"the merged weights {self._client.missing_text()}"

    def close(self) -> None:
        """Do nothing: the model is always an ordinary one."""

    def heartbeat(self) -> Heartbeat:
        """Return what this worker is doing. The I/O thread calls this with the lock held."""
        waiting = self._client.for_round is not None
        current = self.batch.task
        return Heartbeat(
            "waiting" if waiting else "computing", self.round, current.k if current is not None else -1,
            seconds=self._throughput.seconds, rate=self._throughput.rate,
        )  # fmt: skip
