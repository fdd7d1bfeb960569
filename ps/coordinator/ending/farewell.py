"""The end of a run: the coordinator tells all members, and processes that ask later."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

import msgspec

from roundtable.common.protocol.messages.session import Stop
from roundtable.common.protocol.transport import ASK_AGAIN_S
from roundtable.common.runtime.errors import ClusterError, RunStopped
from roundtable.common.storage.event_log import Event
from roundtable.ps.coordinator.context import RunContext
from roundtable.ps.coordinator.ending.stopping import Stopping
from roundtable.ps.coordinator.parts.failover import Failover

log = logging.getLogger("roundtable.ps.coordinator")

#: Seconds for which the coordinator tells members that the run is over, before it leaves.
_FAREWELL_S = 1.0
#: The same before a restart. It is short, because the next coordinator tells members that have not heard.
_RESTART_S = 0.1


class RestartRun(Exception):
    """Raised if the run must go on from its newest checkpoint. All processes restart, this one too."""


class Farewell:
    """Records how the run has ended, and tells members and late processes."""

    def __init__(
        self, context: RunContext, failover: Failover, stopping: Stopping, listen: Callable[[], None], late_s: float | None
    ) -> None:
        """`listen` waits for messages and handles them. For `late_s` seconds processes may ask about a run that is over."""
        self._context = context
        self._failover = failover
        self._stopping = stopping
        self._listen = listen
        self._late_s = late_s
        #: Incarnations of processes that have asked about a run that is over.
        self._late: set[int] = set()
        #: How the run has ended, if it has.
        self.stop: Stop | None = None

    def answer(self, route: bytes, incarnation: int) -> None:
        """Tell a process that comes too late how the run has ended."""
        if self.stop is not None and not self.stop.restart:  # before a restart, let the process ask the next coordinator
            self._late.add(incarnation)
            self._context.mail.reply(route, self.stop)

    def end_as_decided(self, stop: Stop) -> None:
        """End the run as the coordinator before did, which may have died before all members heard.

        Raises RestartRun, RunStopped or ClusterError if the run did not end well.
        """
        self.tell(stop)
        if stop.restart:
            raise RestartRun(stop.reason)
        if not stop.ok:
            raise (RunStopped if stop.on_request else ClusterError)(stop.reason)

    def restart(self, reason: str) -> None:
        """Make all members restart from the newest checkpoint."""
        self._context.log.event(Event("restarted", "coordinator", {"reason": reason}))
        log.warning("all restart, from the newest checkpoint: %s", reason)
        self.say(Stop(False, reason, restart=True))

    def say(self, stop: Stop) -> None:
        """Write to the event log how the run has ended, and tell all members."""
        self._context.log.event(Event("stopped", "coordinator", msgspec.structs.asdict(stop)))
        self._context.flush()
        self.tell(stop)

    def tell(self, stop: Stop) -> None:
        """Tell all members that the run is over, and close the event log.

        Tell them a few times, because messages may be lost. After a take-over, wait for members that have not found this
        coordinator yet.
        """
        self.stop = stop
        until, told_at = time.monotonic() + (_RESTART_S if stop.restart else _FAREWELL_S), float("-inf")
        while (now := time.monotonic()) < until or self._failover.awaits_members(now) or self._awaits_late_ones(now - until):
            if now >= told_at + ASK_AGAIN_S / 4:
                told_at = now
                for route in self._context.mail.routes.values():
                    self._context.mail.reply(route, stop)
            self._listen()
        with contextlib.suppress(Exception):  # a failure to write has been reported
            self._context.log.close()

    def _awaits_late_ones(self, waited_s: float) -> bool:
        """Return whether another process may still ask about a run that is over."""
        settings = self._context.settings
        heard, expected = len(self._context.mail.routes) + len(self._late), settings.servers + settings.workers
        return self._late_s is not None and waited_s < self._late_s and heard < expected and not self._stopping.signal
