"""A queue of long jobs, which do one tile at a time and run in the order in which they were added."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from roundtable.ps.sharded.layer import Job


@dataclass(frozen=True)
class _Task:
    """A job in the queue."""

    job: Job
    #: The worker that waits for the job's answer, or "".
    asker: str = ""
    #: True if the job updates rows.
    changes: bool = False


class JobQueue:
    """The jobs of one server's sharded layers."""

    def __init__(self) -> None:
        self._tasks: deque[_Task] = deque()
        #: Return True if rows may change now. They may not while a checkpoint or the backup reads them in place.
        self.may_update: Callable[[], bool] = lambda: True
        #: Tiles done so far.
        self.steps = 0

    def answer(self, job: Job, asker: str) -> None:
        """Add a job that the worker `asker` waits for."""
        self._tasks.append(_Task(job, asker))

    def update(self, job: Job) -> None:
        """Add a job that changes rows."""
        self._tasks.append(_Task(job, changes=True))

    def measure(self, job: Job) -> None:
        """Add a job that no worker waits for and that changes no rows."""
        self._tasks.append(_Task(job))

    @property
    def updates(self) -> int:
        """Return how many updates are queued or in progress."""
        return sum(task.changes for task in self._tasks)

    @property
    def busy(self) -> bool:
        """Return True if the next job can go on now."""
        return bool(self._tasks) and (not self._tasks[0].changes or self.may_update())

    def step(self) -> tuple[str, Any] | None:
        """Do the next tile of the first job. If that completes an answer, return the worker and the answer."""
        task = self._tasks[0]
        self.steps += 1
        try:
            next(task.job)
        except StopIteration as end:
            self._tasks.popleft()
            return (task.asker, end.value) if task.asker else None
        return None
