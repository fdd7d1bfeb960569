"""A worker is told round by round of the work that is left."""

from __future__ import annotations

from roundtable.common.config.batch_plan import Task
from roundtable.common.config.work_shares import ShareTable
from roundtable.common.protocol.messages.session import Reassign
from roundtable.worker.loop.task_queue import TaskQueue


# I10
def test_what_is_left_of_a_round_is_of_no_other() -> None:
    tasks = TaskQueue("worker-0", [ShareTable(0, 0, ["worker-0", "worker-1"], [1, 1])])
    tasks.open(3, 5)
    tasks.reassigned(Reassign(2, 1, "worker-0", "worker-1"))  # of a round that servers have not closed yet, and that is shorter
    assert tasks.left(3) == [0, 1, 2]
    assert tasks.left(2) == [1]
    assert [tasks.next() for _ in range(4)] == [Task(3, 0), Task(3, 1), Task(3, 2), Task(2, 1)]
    assert tasks.left(3) == tasks.left(2) == []
