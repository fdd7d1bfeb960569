"""Stop signals as a flag for a loop to look at. So no signal interrupts the launcher between starting a process and noting it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from roundtable.common.runtime.errors import Stopped

_Handler = Callable[[int, FrameType | None], Any] | int | None


class StopSignals:
    """A context in which SIGINT, SIGTERM and SIGHUP are only counted.

    If SIGHUP was ignored before, as under nohup, it stays ignored.
    """

    def __init__(self) -> None:
        #: The first signal that came, if any.
        self.first: signal.Signals | None = None
        #: How many signals have come.
        self.count = 0
        self._before: dict[signal.Signals, _Handler] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.first = self.first or signal.Signals(number)
        self.count += 1


def stopped(number: int, frame: FrameType | None) -> None:
    """Raise Stopped. A handler, so the main thread raises it."""
    raise Stopped(number)
