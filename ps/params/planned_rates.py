"""The learning rate of each micro-batch where pushes are applied at once.

A schedule plans a rate for each round, and workers send it with their pushes. A slow worker is at an early round when the others
are near the end, so the rate of its own round would be far too high there. Hence the plan is followed in the order in which
micro-batches come: number n gets what is planned for number n, whatever round it belongs to. So each planned rate is used once.

With `--staleness-lr` a push moves the weights by less, the older the weights are that it was computed from (see
common/policies/ssp.py). What such pushes lose is handed out again, in equal shares to all: the weights move as far as planned.
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
    """Return the settings of parameter group number `group`, if `hypers` has some for it."""
    return hypers[group] if 0 <= group < len(hypers) else {}


#: Micro-batches over which the policy's factors are averaged, and over which what they have taken is handed out again.
_WINDOW = 32


@dataclass(frozen=True)
class Terms:
    """How one micro-batch is applied, in all its parts: updates since the weights that it was computed from, the factor on the
    learning rate, and the parameter groups' settings."""

    staleness: int
    lr_scale: float
    hypers: Hypers


class PlannedRates:
    """Says on which terms each micro-batch is applied. Invariants: as often as a round is planned to have a micro-batch, its
    settings are used, if a worker has told them in time; the mean of all `lr_scale` tends to 1.
    """

    def __init__(self, policy: Policy, seen: int = 0) -> None:
        """`seen` is the number of micro-batches that were seen before, of a run that goes on."""
        self.seen = seen
        self._policy = policy
        #: By round, the settings that its first push had; those of rounds that the plan has left behind are forgotten.
        self._announced: dict[int, Hypers] = {}
        #: The segment that the plan has got to, and micro-batches before it.
        self._at = self._before = 0
        #: A moving mean of the policy's factors, over how many at most, and what they have taken and was not handed out yet.
        self._mean, self._count, self._owed = 1.0, 0, 0.0

    def take(self, round_: int, base: int, hypers: Hypers, segments: Sequence[Segment], is_new: bool = True) -> Terms:
        """The terms of a micro-batch of `round_`, whose push has these `hypers` and was computed from weights of `base` updates.
        It `is_new` unless it was counted before, by a server in this one's place."""
        number = self.seen
        self.seen += is_new
        staleness = max(0, number - base)
        return Terms(staleness, self._factor(staleness), self._planned(self._round_of(number, segments), round_, hypers))

    def _round_of(self, number: int, segments: Sequence[Segment]) -> int:
        """The round that has micro-batch `number` of the run, if all are counted from 0 in the order of the plan; the last round
        where there is no such micro-batch."""
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
