"""What a process has refused: counted by kind, and logged seldom, for whoever sends nonsense may send much of it."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Literal, cast

from roundtable.common.runtime.errors import WireError

Kind = Literal["malformed", "oversized", "protocol", "run", "sender", "unfit", "flood", "unread"]

#: Seconds between two lines on one kind.
_LOG_S = 10.0


class Rejections:
    """Kinds are `malformed` (no message of ours), `oversized`, `protocol` (another version), `run` (another run), `sender` (not
    who it says it is, or not known), `unfit` (does not fit what the run is or where it stands), `flood` (a connection that was
    shut because what it sent was no end of a message, or more than was asked for) and `unread` (not sent, for its receiver
    has not taken what was sent before)."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._counts: Counter[str] = Counter()
        self._reported: dict[str, tuple[float, int]] = {}

    def note(self, error: WireError, now: float, who: str = "") -> None:
        """Count what was refused; and log it, unless the same kind was logged a moment ago."""
        self._counts[error.kind] += 1
        at, count = self._reported.get(error.kind, (float("-inf"), 0))
        if now >= at + _LOG_S:
            more = self._counts[error.kind] - count - 1
            self._reported[error.kind] = now, self._counts[error.kind]
            since = f" (and {more} more of this kind since the last line)" if more else ""
            self._log.warning("refused%s: %s%s", f" from {who}" if who else "", str(error)[:500], since)

    @property
    def counts(self) -> dict[Kind, int]:
        """How many of each kind."""
        return cast(dict[Kind, int], dict(self._counts))
