"""How the micro-batches of a round are divided among the workers: the same function everywhere, so that a quiet
cluster needs no message to assign work.

A table is what one membership epoch says about shares. Exceptions to it (a worker that takes over what another has
not done) are messages, and are the coordinator's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import msgspec

from roundtable.common.config.field_types import Count, Many, Name


class ShareTable(msgspec.Struct, frozen=True, dict=True):
    """Shares of the workers from round `from_round` on. `weights` are whole numbers, one for each of `workers`."""

    epoch: Count
    from_round: Count
    workers: Many[Name]
    weights: Many[Count]

    def __post_init__(self) -> None:
        if len(self.workers) != len(self.weights) or not any(self.weights):
            raise ValueError("a table needs a weight for each worker, and one above 0")

    def run(self, worker: str, count: int) -> range:
        """The contiguous micro-batches, out of `count`, that `worker` computes; empty for a stranger."""
        if count not in self._runs:
            self._runs[count] = dict(zip(self.workers, shares(count, self.weights), strict=True))
        return self._runs[count].get(worker, range(0))

    @cached_property
    def _runs(self) -> dict[int, dict[str, range]]:
        """Everybody's runs, for each number of micro-batches that was asked for: there are few."""
        return {}

    def owner(self, k: int, count: int) -> str:
        """Whose run micro-batch `k` of `count` is in."""
        return next(w for w, run in zip(self.workers, shares(count, self.weights), strict=True) if k in run)


def shares(count: int, weights: Sequence[int]) -> list[range]:
    """Cut 0..count-1 into contiguous runs as near to `weights` as whole numbers get (cumulative rounding).

    More workers than micro-batches leave some with an empty run. Raises ValueError unless some weight is above 0.
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
    """The newest of `tables` (oldest first) that holds for `round_`; the oldest known where that has been forgotten."""
    return next((table for table in reversed(tables) if table.from_round <= round_), tables[0])
