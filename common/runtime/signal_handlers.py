"""Handle signals for a time."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence


@contextlib.contextmanager
def handled(signals: Sequence[signal.Signals], handler: Callable[[int], None]) -> Iterator[None]:
    """Call `handler` with each of these signals that comes, inside the context."""
    before = {number: signal.signal(number, lambda number, frame: handler(number)) for number in signals}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
