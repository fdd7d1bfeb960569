"""Compares the settings of parameter groups that workers send for one round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from roundtable.common.protocol.messages.setup import Update
from roundtable.common.runtime.errors import UsageError
from roundtable.ps.params.planned_rates import of_group

#: A worker, and the settings that it sent.
Sent = tuple[str, Sequence[Mapping[str, Any]]]


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
