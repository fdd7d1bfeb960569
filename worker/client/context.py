"""The objects that all parts of a worker share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from roundtable.common.config.settings import Settings
from roundtable.common.policies import Policy
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.setup import Accepted, Request
from roundtable.common.protocol.transport import Frames
from roundtable.worker.client.io_thread import IoThread

T = TypeVar("T")

#: Seconds that a worker waits longer than servers do. A server can then name the process that does not answer before it.
_MARGIN_S = 20.0


def is_accepted(request: Request, id_: int) -> Callable[[Body], bool]:
    """Return a predicate that says whether a message accepts request number `id_` of its kind."""
    return lambda body: body == Accepted(request, id_)


@dataclass(frozen=True)
class WorkerContext:
    """One worker: its name and number, its run, and the thread that sends and receives its messages."""

    name: str
    index: int
    settings: Settings
    policy: Policy
    io: IoThread

    @property
    def timeout_s(self) -> float:
        """Seconds after which a wait for other processes fails."""
        return self.settings.progress_timeout + _MARGIN_S

    def wait(self, ready: Callable[[], T | None], what: Callable[[], str], every: float | None = None) -> T | None:
        """Block until `ready()` is neither None nor False, or for `every` seconds. See `IoThread.wait`."""
        return self.io.wait(ready, self.timeout_s, what, every)

    def request(
        self, to: str, body: Body, answer: Callable[[Body], bool], frames: Frames = (), again: float | None = None
    ) -> Body:
        """Send a message until it is answered, and return the answer. See `IoThread.request`."""
        return self.io.request(to, body, answer, self.settings.progress_timeout, frames, again)
