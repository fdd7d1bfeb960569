"""The segments of a script: one for each loop over `run.batches()`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from roundtable.common.config.batch_plan import Segment, Task, make_segment
from roundtable.common.config.worker_facts import Fact
from roundtable.common.protocol.effects import COORDINATOR
from roundtable.common.protocol.messages.setup import Plan, PlanReply
from roundtable.common.runtime.errors import UsageError
from roundtable.worker import facts as alike
from roundtable.worker.client.context import WorkerContext
from roundtable.worker.data.loader import Loader, dataset_size
from roundtable.worker.loop.task_queue import TaskQueue


@dataclass(frozen=True)
class Samples:
    """The arguments of `run.batches()` that say which samples to load, and how."""

    dataset: Dataset[Any]
    shuffle: bool
    num_workers: int
    collate_fn: Callable[[list[Any]], Any] | None


class Segments:
    """Makes all processes agree on each segment, and loads its samples."""

    def __init__(self, context: WorkerContext, tasks: TaskQueue, servers: int, round_now: Callable[[], int]) -> None:
        self._context, self._tasks, self._servers, self._round = context, tasks, servers, round_now
        self._all: list[Segment] = []
        #: The data set for which the coordinator has facts of samples.
        self._compared: object = None

    @property
    def none(self) -> bool:
        """Whether no segment has started yet."""
        return not self._all

    @property
    def done(self) -> bool:
        """Whether no segment is under way."""
        return not self._all or self._round() >= self._all[-1].end

    def plan(self, dataset: Dataset[Any], micro_batch: int | None, global_batch: int | None, epochs: int | None) -> Segment:
        """Return the next segment. Raises UsageError if there cannot be one, as `run.batches` says."""
        if not self.done:
            raise UsageError(
                f"the previous run.batches() loop stopped at round {self._round()} of {self._all[-1].end}: finish it before "
                "starting another."
            )
        settings = self._context.settings
        micro, whole = micro_batch or settings.micro_batch, global_batch or settings.global_batch
        if micro > whole:
            raise UsageError(f"micro_batch ({micro}) must not exceed global_batch ({whole}).")
        return make_segment(
            before=self._all[-1] if self._all else None,
            samples=dataset_size(dataset),
            global_batch=whole,
            micro_batch=micro,
            epochs=epochs or settings.epochs,
            round_limit=settings.rounds,
        )

    def begin(self, segment: Segment, samples: Samples, schedule: alike.ScheduleFacts | None) -> Loader:
        """Agree on a segment with the coordinator and all servers, and return the loader of its micro-batches."""
        self._all.append(segment)
        plan = Plan(segment, facts=self._facts_of(segment, samples, schedule))
        for name in [COORDINATOR, *(f"server-{number}" for number in range(self._servers))]:
            ready = self._context.request(name, plan, lambda b: isinstance(b, PlanReply) and b.segment == segment.index)
            if name == COORDINATOR and isinstance(ready, PlanReply):
                plan = Plan(segment, ready.seal)
        return Loader(
            samples.dataset,
            segment,
            self._context.settings.seed,
            shuffle=samples.shuffle,
            num_workers=samples.num_workers if self._round() < segment.end else 0,  # a late worker may find the segment over
            collate_fn=samples.collate_fn,
            forecast=lambda: self._forecast(segment),
        )

    def _facts_of(self, segment: Segment, samples: Samples, schedule: alike.ScheduleFacts | None) -> list[Fact]:
        """Return the facts that must be equal on all workers in a segment."""
        dataset, collate_fn = samples.dataset, samples.collate_fn
        facts = [
            alike.setting("shuffle", samples.shuffle),
            alike.setting("the data set", alike.called(type(dataset))),
            alike.setting("collate_fn", alike.called(collate_fn) if collate_fn is not None else "none"),
        ]
        if dataset is not self._compared:
            self._compared = dataset
            in_order = not samples.num_workers
            seed = self._context.settings.seed
            facts += alike.sample_facts(dataset, seed, segment.first_epoch, segment.samples, in_order)
        return facts + (schedule.of(segment) if schedule is not None else [])

    def _forecast(self, segment: Segment) -> Iterator[Task]:
        """Yield the micro-batches that this worker will probably compute."""
        round_ = segment.first_round
        while round_ < segment.end:
            round_ = max(round_, self._round())
            if round_ >= segment.end:
                return
            with self._context.io.lock:
                tasks = self._tasks.expected(round_, segment.round(round_).micro_batches)
            yield from tasks
            round_ += 1
