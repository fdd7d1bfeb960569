"""Ctrl-C and its like as a flag that a loop looks at, so that no signal can come between starting a process and noting it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from roundtable.common.runtime.errors import Stopped

_Handler = Callable[[int, FrameType | None], Any] | int | None


class StopSignals:
    """A context in which SIGINT, SIGTERM and SIGHUP do nothing but to be counted.

    SIGHUP stays ignored where it was, as under nohup.
    """

    def __init__(self) -> None:
        #: The first signal that came, if any, and how many have.
        self.first: signal.Signals | None = None
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
    """A handler that has the main thread raise Stopped."""
    raise Stopped(number)
