"""The launcher's care for servers and workers: restarts of killed processes, and the number of workers."""

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

#: Seconds for the run to end by itself after the last worker has ended well.
_END_S = 10.0


class Supervisor:
    """Looks after all children but the coordinator, each time `look` is called. It reports by `say`."""

    def __init__(
        self,
        processes: Processes,
        worker: Callable[[int | None], Sequence[str]],
        env: Callable[[int, int], Mapping[str, str]],
        restart_policy: RestartPolicy,
        is_local: bool,
        say: Callable[[str], None],
    ) -> None:
        """Make a supervisor.

        `worker(n)` is the command of a worker that asks for the number n, or for none. `env(n, workers)` is added to the
        environment of the n-th of so many workers. `is_local`: the policy needs all workers, so the run cannot go on without one.
        """
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
        """Start `count` more workers and return their names. Raises OSError if one cannot be started."""
        first = len(self._workers)
        for number in range(first, first + count):
            env = self._env(number, first + count)
            self._processes.start(f"worker-{number}", self._worker(number if numbered else None), **env)
        return [child.name for child in self._workers[first:]]

    def scale(self, count: int) -> None:
        """Change the number of workers to `count`: start new ones, or tell the newest ones to finish a micro-batch and leave."""
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
        """Restart killed children within the restart limit, kill servers that hang, and excuse exits that do not fail the run.

        `finished`: the run has ended well. Raises ClusterError if no worker is left and none will come, or UsageError if the
        last worker ended by its user's mistake.
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
        """Return whether a worker's script has failed and the run goes on without it.

        If the worker had joined, the coordinator decides. If it had not, the run goes on once it trains.
        """
        if child.code is None or child.code < 0:
            return False
        if child.popen.pid in progress.joined:
            return self._is_lost(child, progress)
        return progress.total is not None and not self._is_local

    def _is_lost(self, child: Child, progress: Progress) -> bool:
        """Return whether the coordinator goes on without a process."""
        pid = child.popen.pid
        return (progress.joined.get(pid, ""), pid) in progress.lost

    def awaits_word(self, progress: Progress) -> bool:
        """Return whether a worker that had joined has failed, and the coordinator still has to decide whether the run goes on."""
        return any(child.failed and child.popen.pid in progress.joined for child in self._workers)

    def _end_hung(self, child: Child) -> None:
        """Kill a server that the coordinator counts as lost. Its name and process id are those of our child."""
        if child.popen.pid not in self._ended:
            self._ended.add(child.popen.pid)
            self._say(f"{child.name} does not respond; killing it.")
            child.popen.kill()

    def kill_late(self, progress: Progress) -> None:
        """Kill the processes that have no part in the run, which has finished: stopped ones, and ones that came too late."""
        for child in self._processes.children[1:]:
            if child.code is None and _has_no_part(child, progress):
                child.leaves = True
                child.popen.kill()

    def _plan(self, child: Child, now: float) -> bool:
        """Plan the restart of a child, unless the restart limit is reached. Return whether it will be restarted."""
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
            raise ClusterError(f"{child.name} cannot be restarted: {error.strerror or error}.") from None

    def _check_any_left(self, progress: Progress, now: float) -> None:
        workers = self._workers
        if not workers or any(child.code is None or child.failed or child.due_at is not None for child in workers):
            return
        if any(row.process.startswith("worker") and row.state not in ("lost", "done") for row in progress.processes):
            return  # this worker may have been started elsewhere
        if progress.has_model:
            return  # no worker is needed any more
        last = max(workers, key=lambda child: child.ended_at)
        if last.code:
            kind = UsageError if last.code == USAGE else ClusterError  # as if the run ended before the worker is excused
            raise kind(f"no worker is left, and none can be restarted: {last.describe_end()}")
        if any(child.code for child in workers) and now > last.ended_at + _END_S:
            raise ClusterError(f"no worker is left, and the run has not ended: see {last.log}.")


def _has_no_part(child: Child, progress: Progress) -> bool:
    """Return whether a run that has ended well has done so without this process.

    A worker has no part if its script has not ended in the run. A server has none if it was killed, even if it was restarted.
    """
    if child.name.startswith("worker"):
        return progress.joined.get(child.popen.pid) not in progress.left
    return child.restarts > 0 or (child.code is not None and child.code < 0)
