"""How a server or worker joins the coordinator and stays in touch: ask until welcomed, then send heartbeats, and notice silence.

A coordinator that dies may be started again, and rounds go on meanwhile. So its silence is tolerated for longer than that of
other processes (`--coordinator-timeout`).

A state machine: `handle` takes a message of the coordinator, and `tick` returns the messages to send now.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable

from roundtable.common.config.settings import START_S
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.session import Heartbeat, Hello, Refused, Stop, Welcome
from roundtable.common.protocol.transport import ASK_AGAIN_S, HEARTBEAT_S, STOPPED_S
from roundtable.common.runtime.errors import ClusterError, UsageError

log = logging.getLogger("roundtable.common.attendance")

#: Seconds between two log lines about what this process waits for.
TELL_S = 10.0
#: Least seconds between two heartbeats, even if there is news.
NEWS_S = 0.1


class Session:
    """One process's relation to the coordinator at `address`."""

    def __init__(self, hello: Hello, address: str, now: float, start_s: float = START_S) -> None:
        """The coordinator has `start_s` seconds to answer, because it may start later than this process."""
        self._hello = hello
        self._address = address
        #: None until the run starts.
        self.welcome: Welcome | None = None
        #: None until the run is over.
        self.stop: Stop | None = None
        #: The incarnation of the coordinator that counts. A coordinator that takes over the run has a higher one.
        self.coordinator = 0
        self._heard_at, self._was_heard = now, False
        self._silence_s = start_s
        #: In words, what the coordinator waits for, by its last message.
        self._missing = ""
        #: When this process last logged what it waits for.
        self._reported_at = now
        self._sent_at = float("-inf")
        self._ticked_at = now
        #: Whether there is news that the last heartbeat did not have.
        self._news = False

    def is_current(self, incarnation: int) -> bool:
        """Return whether a coordinator's message counts. A late message of an earlier coordinator does not."""
        self.coordinator = incarnation if self.welcome is None else max(self.coordinator, incarnation)
        return incarnation == self.coordinator

    def handle(self, body: Body, now: float) -> None:
        """Take a message of the coordinator. Raises UsageError if it refuses this process."""
        self._heard_at, self._was_heard = now, True
        match body:
            case Welcome():
                self.welcome = self.welcome or body
                self._silence_s = body.settings.coordinator_timeout
            case Stop():
                self.stop = body
            case Heartbeat() if self.welcome is None:
                self._missing = body.awaited
            case Refused(about="Hello"):
                raise UsageError(body.reason)

    def tick(self, now: float, heartbeat: Callable[[], Heartbeat]) -> list[Body]:
        """Return the messages to send now.

        Raises ClusterError if the coordinator has been silent for too long, not counting the time in which this process was
        stopped.
        """
        if (stopped_s := now - self._ticked_at) > STOPPED_S:
            self._heard_at += stopped_s
        self._ticked_at = now
        if now - self._heard_at > self._silence_s:
            raise ClusterError(self._silence(now) + f"; {self._flag()} sets how long to wait for it.")
        self._tell(now)
        every_s = ASK_AGAIN_S if self.welcome is None else NEWS_S if self._news else HEARTBEAT_S
        if now - self._sent_at < every_s:
            return []
        self._sent_at, self._news = now, False
        return [heartbeat() if self.welcome else self._hello]

    def _tell(self, now: float) -> None:
        """Log what this process waits for, if it waits and has not logged it a moment ago."""
        is_silent = now - self._heard_at >= TELL_S
        if now - self._reported_at < TELL_S or not (is_silent or self.welcome is None):
            return
        self._reported_at = now
        if is_silent:
            log.warning("%s", self._silence(now))
        else:
            log.info("waits for the run of %s to start: %s", self._address, self._missing or "others are to join")

    def _silence(self, now: float) -> str:
        text = f"the coordinator at {self._address} has not answered for {now - self._heard_at:.0f} s"
        if self._was_heard:
            return text
        return f"{text}; {platform.node()} asks for it: it must listen there (its --listen), and no firewall may close that port"

    def _flag(self) -> str:
        return "--start-timeout" if self.welcome is None else "--coordinator-timeout"

    def heartbeat_soon(self, now: float) -> bool:
        """Have a heartbeat sent as soon as possible, because there is news. Return whether the next tick sends it."""
        self._news = self.welcome is not None
        return self._news and now - self._sent_at >= NEWS_S
