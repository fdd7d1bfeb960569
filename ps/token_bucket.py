"""A token bucket for each of several names: it limits how much each may use per second, and allows short bursts."""

from __future__ import annotations


class Allowance:
    """A bucket for each name. It fills by `rate` per second, up to `most`."""

    def __init__(self, rate: float, most: float) -> None:
        self._rate = rate
        self._most = most
        #: By name: the amount left at a time, and that time in seconds.
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, name: str, amount: float, now: float) -> bool:
        """Take `amount` from the bucket of `name`. Return False if it has less. A full bucket is enough for any amount."""
        left, at = self._left.get(name, (self._most, now))
        left = min(self._most, left + self._rate * (now - at))
        enough = left >= min(amount, self._most)
        self._left[name] = (left - amount if enough else left), now
        return enough
