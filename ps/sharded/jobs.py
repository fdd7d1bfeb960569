"""What takes long, a tile at a time, in the order in which it came up."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from roundtable.ps.sharded.layer import Job


@dataclass(frozen=True)
class _Task:
    """A job that is waited for by nobody, or by the worker `asker`; `changes`: it is an update of rows."""

    job: Job
    asker: str = ""
    changes: bool = False


class JobQueue:
    """Jobs of one server's sharded layers."""

    def __init__(self) -> None:
        self._tasks: deque[_Task] = deque()
        #: Return True if rows may change now; a checkpoint may have them that is not written yet.
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
        """Add a job that nobody waits for and that changes nothing."""
        self._tasks.append(_Task(job))

    @property
    def updates(self) -> int:
        """Return how many updates are not done."""
        return sum(task.changes for task in self._tasks)

    @property
    def busy(self) -> bool:
        """Return True if there is something to do."""
        return bool(self._tasks) and (not self._tasks[0].changes or self.may_update())

    def step(self) -> tuple[str, Any] | None:
        """Do the next tile. Returns the worker and the answer, if that was the last tile of an answer."""
        task = self._tasks[0]
        self.steps += 1
        try:
            next(task.job)
        except StopIteration as end:
            self._tasks.popleft()
            return (task.asker, end.value) if task.asker else None
        return None
