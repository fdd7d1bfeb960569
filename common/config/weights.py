"""The weight that micro-batches have in means: the number of their samples, unless a script gives another one."""

from __future__ import annotations

from typing import Protocol


class _HasWeight(Protocol):
    @property
    def samples(self) -> int: ...

    @property
    def weight(self) -> float | None: ...


class Weighed:
    """A mixin for records of `samples` samples whose `weight` is None if it is the number of these."""

    __slots__ = ()

    @property
    def total_weight(self: _HasWeight) -> float:
        """Return the weight in means."""
        return self.samples if self.weight is None else self.weight


def weight_if_given(weight: float | None, samples: int) -> float | None:
    """Return the `weight` of a record of `samples` samples: None if it is their number."""
    return None if weight == samples else weight
