"""How the micro-batches of a round are divided among the workers. All processes compute the same shares, so a quiet cluster needs
no message to assign work.

A table has the shares of one membership epoch. The coordinator sends exceptions as messages, by which a worker takes over a
micro-batch of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import msgspec

from roundtable.common.config.field_types import Count, Many, Name


class ShareTable(msgspec.Struct, frozen=True, dict=True):
    """The shares of the workers from round `from_round` on. `weights` are whole numbers, one for each of `workers`."""

    epoch: Count
    from_round: Count
    workers: Many[Name]
    weights: Many[Count]

    def __post_init__(self) -> None:
        if len(self.workers) != len(self.weights) or not any(self.weights):
            raise ValueError("a table needs a weight for each worker, and one above 0")

    def run(self, worker: str, count: int) -> range:
        """Return the contiguous micro-batches, out of `count`, that `worker` computes. They are empty for an unknown worker."""
        if count not in self._runs:
            self._runs[count] = dict(zip(self.workers, shares(count, self.weights), strict=True))
        return self._runs[count].get(worker, range(0))

    @cached_property
    def _runs(self) -> dict[int, dict[str, range]]:
        """The runs of all workers, by number of micro-batches. Only few numbers are asked for."""
        return {}

    def owner(self, k: int, count: int) -> str:
        """Return the worker whose run contains micro-batch `k` of `count`."""
        return next(w for w, run in zip(self.workers, shares(count, self.weights), strict=True) if k in run)


def shares(count: int, weights: Sequence[int]) -> list[range]:
    """Cut 0..count-1 into contiguous runs, and return them. They are as near to `weights` as cumulative rounding gets.

    If there are more workers than micro-batches, some runs are empty. Raises ValueError unless some weight is above 0.
    """
    total = sum(weights)
    if total <= 0 or min(weights) < 0:
        raise ValueError("shares need weights of 0 or more, and one above 0")
    borders, done = [0], 0
    for weight in weights:
        done += weight
        borders.append((2 * count * done + total) // (2 * total))
    return [range(lo, hi) for lo, hi in pairwise(borders)]


def in_force(tables: Sequence[ShareTable], round_: int) -> ShareTable:
    """Return the newest of `tables` (oldest first) that holds for `round_`, or the oldest one if that table was forgotten."""
    return next((table for table in reversed(tables) if table.from_round <= round_), tables[0])
