"""Compares the settings of parameter groups that workers send for one round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from roundtable.common.protocol.messages.setup import Update
from roundtable.common.runtime.errors import UsageError
from roundtable.ps.params.planned_rates import of_group

#: A worker, and the settings that it sent.
Sent = tuple[str, Sequence[Mapping[str, Any]]]


class OpenSettings:
    """The settings that workers have sent for the open rounds."""

    def __init__(self, update: Update) -> None:
        self._update = update
        self._first: dict[int, Sent] = {}

    def take(self, round_: int, sender: str, hypers: Sequence[Mapping[str, Any]]) -> None:
        """Take the settings of a push. Raises UsageError if another push to the round had others."""
        first = self._first.setdefault(round_, (sender, hypers))
        if first[1] != hypers:
            check_same(round_, self._update, first, (sender, hypers))

    def close(self, round_: int) -> None:
        """Forget a round."""
        self._first.pop(round_, None)


def check_same(round_: int, update: Update, one: Sent, other: Sent) -> None:
    """Raise UsageError if two workers have sent different settings for a round.

    A setting that a worker does not send is as in `Setup`.
    """
    (first, ours), (second, theirs) = one, other
    for number, usual in enumerate(update.groups):
        a, b = {**usual, **of_group(ours, number)}, {**usual, **of_group(theirs, number)}
        for key in a:
            if a[key] != b.get(key):
                raise UsageError(
                    f"{first} and {second} have set different values for round {round_}: {key} of parameter group {number} is "
                    f"{a[key]} on {first} and {b.get(key)} on {second}. A worker computes some rounds only, so set a value in "
                    "every round before opt.step(), for example one that is computed from run.round, or attach a scheduler."
                )
