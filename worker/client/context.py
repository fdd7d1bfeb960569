"""What all parts of a worker share."""

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

#: Seconds that a worker waits longer than servers do, so that the one that does not answer is named first.
_MARGIN_S = 20.0


def is_accepted(request: Request, id_: int) -> Callable[[Body], bool]:
    """Return what tells whether a message says that request number `id_` of its kind is done."""
    return lambda body: body == Accepted(request, id_)


@dataclass(frozen=True)
class WorkerContext:
    """One worker: its name and number, the run that it takes part in, and the thread that its messages go by."""

    name: str
    index: int
    settings: Settings
    policy: Policy
    io: IoThread

    @property
    def timeout_s(self) -> float:
        """Seconds after which a wait for others fails."""
        return self.settings.progress_timeout + _MARGIN_S

    def wait(self, ready: Callable[[], T | None], what: Callable[[], str], every: float | None = None) -> T | None:
        """Block until `ready()` is neither None nor False, or for `every` seconds: see `IoThread.wait`."""
        return self.io.wait(ready, self.timeout_s, what, every)

    def request(
        self, to: str, body: Body, answer: Callable[[Body], bool], frames: Frames = (), again: float | None = None
    ) -> Body:
        """Send a message until it is answered, and return the answer: see `IoThread.request`."""
        return self.io.request(to, body, answer, self.settings.progress_timeout, frames, again)
