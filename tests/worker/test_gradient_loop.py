"""The loop of gradient policies: what it does when the coordinator's word comes between two of its looks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

from roundtable.common.config.work_shares import ShareTable
from roundtable.common.protocol.messages.session import Reassign
from roundtable.worker.loop.departure import Departure
from roundtable.worker.loop.gradient_loop import GradientLoop
from roundtable.worker.loop.script_batch import RoundHooks
from roundtable.worker.loop.task_queue import TaskQueue


class Lock:
    """The I/O thread's lock; as it is released, that thread does something."""

    def __init__(self, then: Any) -> None:
        self._then = [then]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for then in self._then:
            then()
        self._then.clear()


def test_what_was_kept_is_pushed_though_the_rest_is_taken_over_between_two_looks() -> None:
    tasks = TaskQueue("worker-0", [ShareTable(1, 0, ["worker-0", "worker-1"], [1, 1])])
    tasks.open(0, 2)
    taken_over = Reassign(0, 0, "worker-1", "worker-0")
    loop = object.__new__(GradientLoop)
    loop.round, loop._per_round, loop._tasks, loop._departure = 0, True, tasks, Departure()
    loop._contributor = Mock()
    loop._weights = Mock(round_invalid=False)
    loop.hooks = RoundHooks()
    loop._context = SimpleNamespace(io=SimpleNamespace(lock=Lock(lambda: tasks.reassigned(taken_over))))  # type: ignore[assignment]
    segment = SimpleNamespace(end=1)
    loop._advance(segment)  # type: ignore[arg-type]
    loop._weights.fetch.assert_not_called()  # there was something to compute, so it does not wait for others' weights yet
    assert tasks.next() is None
    assert not loop._push_finished(segment)  # type: ignore[arg-type]
    loop._contributor.push_held.assert_called_once()
