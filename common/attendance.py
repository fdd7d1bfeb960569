"""How a server or worker joins the coordinator and stays in touch: ask until welcomed, then beat, and notice silence.

A state machine: `handle` takes what the coordinator sent, `tick` returns what to send it now.
"""

from __future__ import annotations

from collections.abc import Callable

from common.errors import ClusterError, UsageError
from common.messages import Beat, Body, Hello, Refused, Stop, Welcome
from common.wire import ASK_AGAIN_S, BEAT_S, GONE_S

#: Seconds to wait for the first answer of a coordinator, which may start later than the others.
FIRST_ANSWER_S = 60.0
#: Seconds between two beats at least, however much news there is.
NEWS_S = 0.05


class Attendance:
    """One process's standing with the coordinator at `address`."""

    def __init__(self, hello: Hello, address: str, now: float) -> None:
        self._hello = hello
        self._address = address
        #: None until the run starts.
        self.welcome: Welcome | None = None
        #: None until the run is over.
        self.stop: Stop | None = None
        self._heard_at = now
        self._silence_s = FIRST_ANSWER_S
        self._sent_at = float("-inf")

    def handle(self, body: Body, now: float) -> None:
        """Raises UsageError where the coordinator refuses this process."""
        self._heard_at, self._silence_s = now, GONE_S
        match body:
            case Welcome():
                self.welcome = self.welcome or body
            case Stop():
                self.stop = body
            case Refused(about="Hello"):
                raise UsageError(body.reason)

    def tick(self, now: float, beat: Callable[[], Beat]) -> list[Body]:
        """Raises ClusterError if the coordinator has been silent for too long."""
        if now - self._heard_at > self._silence_s:
            raise ClusterError(f"the coordinator at {self._address} has not answered for {self._silence_s:.0f} s.")
        if now - self._sent_at < (BEAT_S if self.welcome else ASK_AGAIN_S):
            return []
        self._sent_at = now
        return [beat() if self.welcome else self._hello]

    def beat_soon(self, now: float) -> bool:
        """Let the next tick send a beat, for there is news in it, unless one has just gone out. Whether it will."""
        if self.welcome is None or now - self._sent_at < NEWS_S:
            return False
        self._sent_at = float("-inf")
        return True
