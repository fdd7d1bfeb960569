"""The learning rate of each micro-batch if each push is applied at once.

A schedule plans a rate for each round, and workers send it with their pushes. A slow worker is still at an early round when the
others are near the end. Then the rate of its own round would be far too high. So rates follow the order in which micro-batches
come: the n-th to come gets the rate that is planned for the n-th, whatever its round. Each planned rate is used once.

A push moves the weights by its part of a global batch. If a script gives weights to micro-batches, nobody knows the weight of the
whole global batch when a push of it is applied. `TypicalWeight` estimates it.

With `--staleness-lr` a push moves the weights less if it was computed from older weights (see `common/policies/ssp.py`). The
reduction is handed out again in equal shares to all pushes, so that the weights move as far as planned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from roundtable.common.config.batch_plan import Segment
from roundtable.common.policies import Policy

Hypers = Sequence[Mapping[str, Any]]
_H = TypeVar("_H", bound=Mapping[str, Any])


def of_group(hypers: Sequence[_H], group: int) -> _H | dict[str, Any]:
    """Return the settings of parameter group `group` from `hypers`, or {} if it has none."""
    return hypers[group] if 0 <= group < len(hypers) else {}


#: The factor by which each micro-batch reduces the weight of those before it, in the estimate of `TypicalWeight`.
_FADES = 1 - 1 / 256
#: The policy's factors are averaged over this many micro-batches, and their reductions are handed out again over as many.
_WINDOW = 32


@dataclass(frozen=True)
class Terms:
    """The terms on which all parts of one micro-batch are applied."""

    #: The number of updates since the weights from which the micro-batch was computed.
    staleness: int
    #: The factor on the learning rate.
    lr_scale: float
    #: The settings of each parameter group.
    hypers: Hypers


class TypicalWeight:
    """Estimates the weight of a whole round from the newest micro-batches: their weight by sample.

    Pushes then move the weights by gradient x weight, divided by the mean weight. Over many rounds that is the weighted mean. If
    weights are samples, the estimate is exact.
    """

    def __init__(self, sums: Sequence[float] = (0.0, 0.0)) -> None:
        """`sums` are those of a run that goes on."""
        self.sums = sums[0], sums[1]

    def of_round(self, weight: float, samples: int, samples_of_round: int) -> float:
        """Take in a micro-batch; return the estimate for its round."""
        weights, all_samples = self.sums
        self.sums = weights * _FADES + weight, all_samples * _FADES + samples
        return samples_of_round * (self.sums[0] / self.sums[1])


class PlannedRates:
    """Chooses the terms on which each micro-batch is applied.

    Invariants: if a worker has sent a round's settings in time, they are used once for each micro-batch that the round is planned
    to have. The mean of all `lr_scale` tends to 1.
    """

    def __init__(self, policy: Policy, seen: int = 0) -> None:
        """`seen` is the number of micro-batches seen before the checkpoint from which the run goes on."""
        #: The number of distinct micro-batches seen.
        self.seen = seen
        self._policy = policy
        #: By round: the settings in the first push to it. Rounds that the plan has passed are forgotten.
        self._announced: dict[int, Hypers] = {}
        #: The segment that the plan has reached, and the number of micro-batches before it.
        self._at = self._before = 0
        #: A moving mean of the policy's factors, the number of factors in it, and the reduction not yet handed out again.
        self._mean, self._count, self._owed = 1.0, 0, 0.0

    def take(self, round_: int, base: int, hypers: Hypers, segments: Sequence[Segment], is_new: bool = True) -> Terms:
        """Return the terms of a micro-batch of `round_`. Its push has the settings `hypers`.

        `base` is the number of updates in the weights from which the push was computed. `is_new` is False if the micro-batch was
        counted before this server resumed from a checkpoint.
        """
        number = self.seen
        self.seen += is_new
        staleness = max(0, number - base)
        return Terms(staleness, self._factor(staleness), self._planned(self._round_of(number, segments), round_, hypers))

    def _round_of(self, number: int, segments: Sequence[Segment]) -> int:
        """Return the round of micro-batch `number`, if those of the run are counted from 0 in the order of the plan.

        Return the last round if the plan has fewer micro-batches.
        """
        while self._at + 1 < len(segments) and number >= self._before + segments[self._at].micro_batches:
            self._before += segments[self._at].micro_batches
            self._at += 1
        segment = segments[self._at]
        return min(segment.round_of(number - self._before), segment.end - 1)

    def _planned(self, planned: int, round_: int, hypers: Hypers) -> Hypers:
        self._announced.setdefault(round_, hypers)
        known = max((told for told in self._announced if told <= planned), default=min(self._announced))
        self._announced = {told: settings for told, settings in self._announced.items() if told >= known}
        return self._announced[known]

    def _factor(self, staleness: int) -> float:
        factor = self._policy.lr_scale(staleness)
        self._count = min(self._count + 1, _WINDOW)
        self._mean += (factor - self._mean) / self._count
        evened = factor / self._mean * (1.0 + self._owed / _WINDOW)
        self._owed += 1.0 - evened
        return evened
