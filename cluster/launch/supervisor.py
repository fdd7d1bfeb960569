"""The servers and workers of a launcher: who is started again after it was killed, and how many workers there are to be."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence

from roundtable.cluster.process.children import Child, Processes
from roundtable.cluster.process.restart_policy import RestartPolicy
from roundtable.cluster.run.exit_codes import USAGE
from roundtable.cluster.run.progress import Progress
from roundtable.common.runtime.errors import ClusterError, UsageError
from roundtable.common.runtime.restart import LEAVE_SIGNAL
from roundtable.common.storage.event_log import some

#: Seconds in which the run may yet end by itself when the last worker has ended well.
_END_S = 10.0


class Supervisor:
    """Looks after all children but the coordinator, each time `look` is called; what happens is told by `say`."""

    def __init__(
        self,
        processes: Processes,
        worker: Callable[[int | None], Sequence[str]],
        env: Mapping[str, str],
        restart_policy: RestartPolicy,
        is_local: bool,
        say: Callable[[str], None],
    ) -> None:
        """`worker(n)` is the command of a worker that asks for the number n, or for none, and `env` what it gets besides.
        `is_local`: workers cannot be done without."""
        self._processes = processes
        self._worker = worker
        self._env = env
        self._restart_policy = restart_policy
        self._is_local = is_local
        self._say = say
        #: Servers that hung and were killed, by process id.
        self._ended: set[int] = set()

    @property
    def _workers(self) -> list[Child]:
        return [child for child in self._processes.children if child.name.startswith("worker")]

    def start(self, count: int, numbered: bool = True) -> list[str]:
        """Start so many more workers; their names. OSError where that cannot be."""
        first = len(self._workers)
        for number in range(first, first + count):
            self._processes.start(f"worker-{number}", self._worker(number if numbered else None), **self._env)
        return [child.name for child in self._workers[first:]]

    def scale(self, count: int) -> None:
        """Have `count` workers from now on: the newest ones leave, after what they are at, or others are started."""
        there = [child for child in self._workers if not child.leaves and (child.code is None or child.due_at is not None)]
        leaving = there[count:]
        for child in leaving:
            child.leaves, child.due_at = True, None
            with contextlib.suppress(ProcessLookupError):
                if child.code is None:
                    os.kill(child.popen.pid, LEAVE_SIGNAL)
        try:
            started = self.start(count - len(there), numbered=False)
        except OSError as error:
            self._say(f"no more workers can be started: {error.strerror or error}.")
            return
        told = f"; {some(started)} started" if started else ""
        if leaving:
            told = f"; {some([child.name for child in leaving])} told to leave"
        self._say(f"scaled to {count} {'worker' if count == 1 else 'workers'}{told}.")

    def look(self, progress: Progress, finished: bool) -> None:
        """Start again who was killed, as often as may be, and kill servers that hang. What is no failure of the run is excused.

        `finished`: the run has ended well. Raises ClusterError where no worker is left and none will come,
        UsageError if the last one ended by its user's mistake.
        """
        now = time.monotonic()
        for child in self._processes.children[1:]:
            is_worker = child.name.startswith("worker")
            if child.due_at is not None and now >= child.due_at and not finished:
                self._start_again(child)
            elif child.failed and (child.leaves or (finished and _has_no_part(child, progress))):
                child.excused = True
            elif child.code is None and not is_worker and not finished and (child.name, child.popen.pid) in progress.lost:
                self._end_hung(child)
            elif child.was_stopped and is_worker and not finished and progress.joined.get(child.popen.pid) in progress.left:
                if not child.excused:
                    self._say(f"{child.name} {child.end()}, and has left; the others go on.")
                child.excused = True
            elif child.was_stopped and child.failed and not finished and (not is_worker or self._is_lost(child, progress)):
                child.excused = self._plan(child, now)
            elif child.failed and is_worker and not finished and self._goes_on_without(child, progress):
                child.excused = True
                self._say(f"{child.describe_end().rstrip('.')}; the others go on.")
            elif child.failed and child.code is not None and child.code < 0 and not finished:
                child.excused = self._plan(child, now) or (is_worker and (progress.has_model or not self._is_local))
            elif child.failed and is_worker and progress.joined.get(child.popen.pid) in progress.failed_late:
                child.excused = True
        if not finished:
            self._check_any_left(progress, now)

    def _goes_on_without(self, child: Child, progress: Progress) -> bool:
        """Whether a worker's script has failed and the run goes on: the coordinator says so of one that had joined; one that had
        not is missed by nobody once there is training."""
        if child.code is None or child.code < 0:
            return False
        if child.popen.pid in progress.joined:
            return self._is_lost(child, progress)
        return progress.total is not None and not self._is_local

    def _is_lost(self, child: Child, progress: Progress) -> bool:
        """Whether the coordinator goes on without a process."""
        pid = child.popen.pid
        return (progress.joined.get(pid, ""), pid) in progress.lost

    def awaits_word(self, progress: Progress) -> bool:
        """Whether the coordinator is yet to say what becomes of the run after a worker that was in it has failed."""
        return any(child.failed and child.popen.pid in progress.joined for child in self._workers)

    def _end_hung(self, child: Child) -> None:
        """Kill a server that the coordinator has given up. It is ours by its name, and whatever its message said."""
        if child.popen.pid not in self._ended:
            self._ended.add(child.popen.pid)
            self._say(f"{child.name} does not respond; killing it.")
            child.popen.kill()

    def kill_late(self, progress: Progress) -> None:
        """End processes that have no part in the run, which has finished: stopped ones, and ones that came too late."""
        for child in self._processes.children[1:]:
            if child.code is None and _has_no_part(child, progress):
                child.leaves = True
                child.popen.kill()

    def _plan(self, child: Child, now: float) -> bool:
        """Have a child started again, if it has not been so too often; whether it is."""
        if child.restarts >= self._restart_policy.times:
            self._say(f"{child.name} {child.end()}; restart limit reached (--max-restarts {self._restart_policy.times}).")
            return False
        pause_s = self._restart_policy.pause_s(child.restarts)
        self._say(f"{child.name} {child.end()}; {self._restart_policy.plan(child.restarts, pause_s)}.")
        child.restarts += 1
        child.due_at = now + pause_s
        return True

    def _start_again(self, child: Child) -> None:
        try:
            self._processes.again(child)
        except OSError as error:
            raise ClusterError(f"{child.name} cannot be started again: {error.strerror or error}.") from None

    def _check_any_left(self, progress: Progress, now: float) -> None:
        workers = self._workers
        if not workers or any(child.code is None or child.failed or child.due_at is not None for child in workers):
            return
        if any(row.process.startswith("worker") and row.state not in ("lost", "done") for row in progress.processes):
            return  # it may have been started elsewhere
        if progress.has_model:
            return  # nobody is needed any more
        last = max(workers, key=lambda child: child.ended_at)
        if last.code:
            kind = UsageError if last.code == USAGE else ClusterError  # as it is where the run ends before this worker is excused
            raise kind(f"no worker is left, and none can be restarted: {last.describe_end()}")
        if any(child.code for child in workers) and now > last.ended_at + _END_S:
            raise ClusterError(f"no worker is left, and the run has not ended: see {last.log}.")


def _has_no_part(child: Child, progress: Progress) -> bool:
    """Whether a run that has ended well has done so without this process: a worker whose script has not ended in it, or a server
    that was killed, be it that another has been started in its place."""
    if child.name.startswith("worker"):
        return progress.joined.get(child.popen.pid) not in progress.left
    return child.restarts > 0 or (child.code is not None and child.code < 0)
