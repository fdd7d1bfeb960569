"""Which micro-batch a worker computes next.

In each round, the share table in force gives a worker its run. Micro-batches that others took over are left out, and those that
the worker took over are added. A state machine without a socket or a clock. Invariants:

- A micro-batch of the open round or a later one is handed out at most once.
- No micro-batch is handed out before its round is open, because its weights are not here yet.
- No micro-batch is handed out of a round that was dropped.
"""

from __future__ import annotations

from collections import deque

from roundtable.common.config.batch_plan import Task
from roundtable.common.config.work_shares import ShareTable, in_force
from roundtable.common.protocol.messages.session import Reassign


class TaskQueue:
    """One worker's work list. `round` is the round that the worker is in; -1 before the first."""

    def __init__(self, worker: str, tables: list[ShareTable]) -> None:
        self.worker = worker
        self.tables = tables
        self.round = -1
        #: This worker's own micro-batches of this round that are not started, in order.
        self._run: deque[Task] = deque()
        #: Micro-batches taken over, in order, also of later rounds. They come after the own run.
        self._taken: deque[Task] = deque()
        #: Micro-batches of later rounds that others took over.
        self._given: set[Task] = set()
        #: Micro-batches handed out, of this round or later ones.
        self._begun: set[Task] = set()
        #: No micro-batch of rounds before this one is taken over.
        self._floor = 0

    @property
    def is_chief(self) -> bool:
        """Whether this worker is the one with the lowest number."""
        return self.worker == self.tables[-1].workers[0]

    def open(self, round_: int, count: int) -> None:
        """Start round `round_` of `count` micro-batches, and drop what is left of earlier rounds."""
        self.round = round_
        run = in_force(self.tables, round_).run(self.worker, count)
        self._run = deque(task for k in run if (task := Task(round_, k)) not in self._given and task not in self._begun)
        self._taken = deque(task for task in self._taken if task not in self._run)
        self._given = {task for task in self._given if task.round > round_}
        self._begun = {task for task in self._begun if task.round >= round_}

    def reassigned(self, reassignment: Reassign) -> None:
        """Take note of a reassignment. Reassignments may come twice, late, or for rounds that are not open yet."""
        task = Task(reassignment.round, reassignment.micro_batch)
        if reassignment.to == self.worker:
            if reassignment.round >= self._floor and not any(task in held for held in (self._begun, self._taken, self._run)):
                self._taken.append(task)
        elif reassignment.owner == self.worker:
            if task in self._run:
                self._run.remove(task)
            elif task in self._taken:
                self._taken.remove(task)
            elif reassignment.round > self.round:
                self._given.add(task)

    def forget_begun(self) -> None:
        """Allow micro-batches to be computed again, because a server has lost their gradients."""
        self._begun.clear()

    def next(self) -> Task | None:
        """Return the next micro-batch to compute, or None while there is none."""
        if self._run:
            task = self._run.popleft()
        elif ready := [task for task in self._taken if task.round <= self.round]:
            task = ready[0]
            self._taken.remove(task)
        else:
            return None
        self._begun.add(task)
        return task

    def drop_taken(self, before: int) -> None:
        """Forget micro-batches that were taken over in rounds before this one, which are closed, and accept no more of them."""
        self._floor = max(self._floor, before)
        self._taken = deque(task for task in self._taken if task.round >= before)

    def left(self, round_: int) -> list[int]:
        """Return the micro-batches of a round that are this worker's and not started."""
        return [task.k for task in [*self._run, *self._taken] if task.round == round_]

    def taken_elsewhere(self, round_: int) -> list[tuple[int, int]]:
        """Return (round, micro-batch) of those taken over in other rounds than this one and not started."""
        return [(task.round, task.k) for task in self._taken if task.round != round_]

    @property
    def any(self) -> bool:
        return bool(self._run) or any(task.round <= self.round for task in self._taken)

    @property
    def run_done(self) -> bool:
        """Whether nothing is left of the own run of this round."""
        return not self._run

    def expected(self, round_: int, count: int) -> list[Task]:
        """Return what this worker will probably compute in a later round, for loading ahead."""
        run = in_force(self.tables, round_).run(self.worker, count)
        return [task for k in run if (task := Task(round_, k)) not in self._given]
