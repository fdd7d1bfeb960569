"""The messages that a process has refused, counted by kind. They are logged seldom, because a hostile peer may send many."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Literal, cast

from roundtable.common.runtime.errors import WireError

Kind = Literal["malformed", "oversized", "protocol", "run", "sender", "unfit", "flood", "unread"]

#: Seconds between two log lines on one kind.
_LOG_S = 10.0


class Rejections:
    """Counts refused messages by kind.

    - `malformed`: it is no message of this protocol.
    - `oversized`: it is too large.
    - `protocol`: it has another version of the protocol.
    - `run`: it belongs to another run.
    - `sender`: its sender is not known, or is not the process it claims to be.
    - `unfit`: it does not fit the run or the run's progress.
    - `flood`: its connection was shut because of a message without an end, or of more messages than were asked for.
    - `unread`: it was not sent, because its receiver has not taken earlier messages.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._counts: Counter[str] = Counter()
        self._reported: dict[str, tuple[float, int]] = {}

    def note(self, error: WireError, now: float, who: str = "") -> None:
        """Count a refused message. Log it, unless one of the same kind was logged a moment ago."""
        self._counts[error.kind] += 1
        at, count = self._reported.get(error.kind, (float("-inf"), 0))
        if now >= at + _LOG_S:
            more = self._counts[error.kind] - count - 1
            self._reported[error.kind] = now, self._counts[error.kind]
            since = f" (and {more} more of this kind since the last line)" if more else ""
            self._log.warning("refused%s: %s%s", f" from {who}" if who else "", str(error)[:500], since)

    @property
    def counts(self) -> dict[Kind, int]:
        """Number of refused messages of each kind."""
        return cast(dict[Kind, int], dict(self._counts))
