"""The segments of a script: one for each loop over `run.batches()`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch

from roundtable.common.config.batch_plan import Segment, Task, make_segment, most_samples, samples_per_epoch
from roundtable.common.config.worker_facts import Fact
from roundtable.common.protocol.effects import COORDINATOR
from roundtable.common.protocol.messages.setup import Plan, PlanReply
from roundtable.common.runtime.errors import UsageError
from roundtable.worker import facts as alike
from roundtable.worker.client.context import WorkerContext
from roundtable.worker.data.arguments import Data
from roundtable.worker.data.loader import Loader, Processes
from roundtable.worker.data.streams.stream import Stream
from roundtable.worker.loop.departure import Departure
from roundtable.worker.loop.gradient_loop import GradientLoop
from roundtable.worker.loop.local_sgd import LocalSgdLoop
from roundtable.worker.loop.task_queue import TaskQueue

log = logging.getLogger("roundtable.worker.run")

_CPU = torch.device("cpu")


class Segments:
    """Makes all processes agree on each segment, and loads its samples."""

    def __init__(
        self,
        context: WorkerContext,
        tasks: TaskQueue,
        departure: Departure,
        servers: int,
        work: Callable[[], GradientLoop | LocalSgdLoop | None],
    ) -> None:
        """`work()` is the loop of the training; None before the script has made its optimizer."""
        self._context, self._tasks, self._departure, self._servers, self._work = context, tasks, departure, servers, work
        self._all: list[Segment] = []
        #: The segment that was planned last, which may not have begun.
        self.planned: Segment | None = None
        #: Whether a loop makes one pass over the data if the script does not say how many.
        self.one_epoch_each = False
        #: Loading processes for the next loop over the same batches.
        self._kept: Processes | None = None
        #: The data set for which the coordinator has facts of samples.
        self._compared: object = None

    @property
    def none(self) -> bool:
        """Whether no segment has started yet."""
        return not self._all

    @property
    def begun(self) -> int:
        """The number of segments that have begun."""
        return len(self._all)

    @property
    def reached_limit(self) -> bool:
        """Whether the segments that have begun have all rounds that the run may have."""
        limit = self._context.settings.rounds
        return limit is not None and bool(self._all) and self._all[-1].end >= limit

    @property
    def done(self) -> bool:
        """Whether no segment is under way."""
        return not self._all or ((self.round >= self._all[-1].end or self._is_over) and not self.ends_round)

    @property
    def ends_round(self) -> bool:
        """Whether a function of the script for the end of a round runs now."""
        work = self._work()
        return work is not None and work.hooks.running

    @property
    def is_cut_off(self) -> bool:
        """Whether the run ends early, and the script has left its last loop because of that."""
        return not self.done and self._departure.ends_after is not None

    @property
    def _is_over(self) -> bool:
        """Whether this worker has come to the early end of the run, for which a script has asked."""
        work = self._work()
        return work is not None and self._departure.is_end(work.updates)

    @property
    def round(self) -> int:
        """The round of the model's weights."""
        work = self._work()
        return work.round if work is not None else 0

    @property
    def next_epoch(self) -> int:
        """The first data epoch that no segment has yet."""
        return self._all[-1].first_epoch + self._all[-1].epochs if self._all else 0

    @property
    def total_rounds(self) -> int:
        """The rounds of all segments, and of the one that was planned last."""
        return self.planned.end if self.planned is not None else 0

    def plan(self, data: Data) -> Segment:
        """Return the segment that would come next. Raises UsageError if the batches cannot be cut as `data` asks."""
        settings = self._context.settings
        micro, whole = data.micro_batch or settings.micro_batch, data.global_batch or settings.global_batch
        least, places = data.min_micro_batch, data.order.places
        if micro > whole:
            raise UsageError(f"micro_batch ({micro}) must not exceed global_batch ({whole}).")
        if most_samples(whole, micro, least) != whole:
            raise UsageError(
                f"global_batch {whole} cannot be cut into micro-batches of {least} to {micro} samples: make it a multiple of "
                "micro_batch, or min_micro_batch smaller."
            )
        samples = samples_per_epoch(places, whole, micro, least, data.drop_last)
        if not samples:
            dropped = f"drop_last leaves out rounds of fewer than {whole}" if data.drop_last else f"min_micro_batch is {least}"
            raise UsageError(f"an epoch has {places} samples, of which none would be used: {dropped}.")
        return make_segment(
            before=self._all[-1] if self._all else None,
            samples=samples,
            global_batch=whole,
            micro_batch=micro,
            epochs=data.epochs or (1 if self.one_epoch_each else settings.epochs),
            round_limit=settings.rounds,
            min_micro_batch=least,
        )

    def expected(self, segment: Segment) -> int:
        """Return how many micro-batches of a segment this worker computes from now on, if shares stay as they are."""
        with self._context.io.lock:
            table = self._tasks.tables[-1]
            sizes = segment.rounds_by_size(self.round)
            return sum(rounds * len(table.run(self._context.name, count)) for count, rounds in sizes.items())

    def begin(self, segment: Segment, data: Data, schedule: alike.ScheduleFacts | None, device: torch.device = _CPU) -> Loader:
        """Agree on a segment with the coordinator and all servers, and return the loader of its micro-batches.

        Raises UsageError if the segment before has not ended.
        """
        if not self.done:
            raise UsageError(
                f"the previous run.batches() loop stopped at round {self.round} of {self._all[-1].end}: finish it before "
                "starting another."
            )
        self._agree(segment, self._facts_of(segment, data, schedule))
        seed, forecast = self._context.settings.seed, lambda: self._forecast(segment)
        is_over = self._is_over or self.round >= segment.end  # for a late worker, or after the run's early end
        processes = None if is_over else self._processes_for(data, device)
        return Loader(data, segment, seed, forecast=forecast, processes=processes, device=device)

    def adopt(self, segment: Segment) -> None:
        """Count a segment that is done as one that this script has begun. Raises UsageError if other workers have another."""
        self._agree(segment, [])

    def _agree(self, segment: Segment, facts: list[Fact]) -> None:
        """Tell the coordinator and all servers of the next segment, and wait until they know it."""
        self._all.append(segment)
        self.planned = segment
        plan = Plan(segment, facts=facts)
        for name in [COORDINATOR, *(f"server-{number}" for number in range(self._servers))]:
            ready = self._context.request(name, plan, lambda b: isinstance(b, PlanReply) and b.segment == segment.index)
            if name == COORDINATOR and isinstance(ready, PlanReply):
                plan = Plan(segment, ready.seal)

    def close(self) -> None:
        """End the loading processes that were kept."""
        self._kept = None

    def _processes_for(self, data: Data, device: torch.device) -> Processes | None:
        """Return the processes that load; None if this one loads."""
        if self._kept is not None and self._kept.data is data:
            return self._kept
        self._kept = None
        if not data.processes:
            return None
        processes = Processes(data, self._context.settings.seed, device)
        self._kept = processes if data.processes.get("persistent_workers") else None
        return processes

    def _facts_of(self, segment: Segment, data: Data, schedule: alike.ScheduleFacts | None) -> list[Fact]:
        """Return the facts that must be equal on all workers in a segment."""
        seed = self._context.settings.seed
        facts = [
            alike.setting("the data set", getattr(data.dataset, "kind", "") or alike.called(type(data.dataset))),
            alike.setting("samples in the data set", data.samples),
            alike.setting("collate_fn", alike.called(data.collate_fn) if data.collate_fn is not None else "none"),
            *alike.order_facts(data.order, segment),
        ]
        if data.dataset is not self._compared:
            self._compared = data.dataset
            self._warn_of_costs(data)
            facts += alike.sample_facts(data.dataset, seed, segment.first_epoch, data.samples, not data.processes)
        return facts + (schedule.of(segment) if schedule is not None else [])

    def _warn_of_costs(self, data: Data) -> None:
        """Warn if all workers read all of a stream."""
        stream = data.dataset
        if (
            isinstance(stream, Stream)
            and stream.reads_from_start
            and len(stream.shards) == 1
            and self._context.settings.workers > 1
        ):
            log.warning(
                "%s is one shard that is read from its start, so every worker reads all of it: with num_shards and "
                "open_shard(shard, position), each would read its own part.", stream.kind,
            )  # fmt: skip

    def _forecast(self, segment: Segment) -> Iterator[Task]:
        """Yield the micro-batches that this worker will probably compute."""
        round_ = segment.first_round
        while round_ < segment.end:
            round_ = max(round_, self.round)
            if round_ >= segment.end:
                return
            with self._context.io.lock:
                tasks = self._tasks.expected(round_, segment.round(round_).micro_batches)
            yield from tasks
            round_ += 1
