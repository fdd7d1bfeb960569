"""How much of something each of several may use: so much a second, and more at once after a while of less."""

from __future__ import annotations


class Allowance:
    """A bucket for each name, which fills by `rate` a second up to `most`."""

    def __init__(self, rate: float, most: float) -> None:
        self._rate = rate
        self._most = most
        #: The amount that is left to each, and since when.
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, name: str, amount: float, now: float) -> bool:
        """Use `amount`, if so much is left to `name`. A full bucket is enough for any amount."""
        left, at = self._left.get(name, (self._most, now))
        left = min(self._most, left + self._rate * (now - at))
        enough = left >= min(amount, self._most)
        self._left[name] = (left - amount if enough else left), now
        return enough
