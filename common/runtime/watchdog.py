"""Log the stacks of all threads of a process that makes no progress, once per stall."""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading
from collections.abc import Callable, Hashable
from time import monotonic

log = logging.getLogger("roundtable.common.watchdog")


class Watchdog:
    """A thread that looks at `progress()` now and then. None means that there is nothing to make progress with.

    If it stays the same for `seconds`, the stacks are dumped, with `waits_for()`: what the process says it waits for. Nothing is
    ended, because waiting may be right; deadlines are elsewhere. If the process does not even let this thread run, Python's own
    timer dumps the stacks after twice the time.
    """

    def __init__(self, seconds: float, progress: Callable[[], Hashable], waits_for: Callable[[], str]) -> None:
        self._seconds = seconds
        self._progress = progress
        self._waits_for = waits_for
        self._stopped = threading.Event()
        self._last: Hashable = None
        self._since = monotonic()
        self._reported = False
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        if seconds > 0:
            self._thread.start()

    def look(self, now: float) -> bool:
        """Return True if the stacks must be dumped at the time `now`."""
        seen = self._progress()
        if seen != self._last or seen is None:
            self._last, self._since, self._reported = seen, now, False
        if self._reported or now < self._since + self._seconds:
            return False
        self._reported = True
        return True

    def _run(self) -> None:
        every = min(1.0, self._seconds / 4)
        while not self._stopped.wait(every):
            faulthandler.dump_traceback_later(2 * self._seconds, exit=False, file=sys.__stderr__ or sys.stderr)
            if self.look(monotonic()):
                log.warning("no progress for %.0f s, waiting for %s. Stack traces:", self._seconds, self._waits_for())
                faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
        faulthandler.cancel_dump_traceback_later()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=1.0)
