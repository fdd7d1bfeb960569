"""Facts that must be equal on all workers, besides the model and the plan, and their comparison.

A worker with other facts would silently train something else, and the result would depend on which worker was first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import msgspec

from roundtable.common.config.field_types import Name

#: Most facts of a message, and most numbers of a fact.
MOST_FACTS, MOST_NUMBERS = 200, 64


class Fact(msgspec.Struct, frozen=True, array_like=True):
    """One of a worker's settings, or a trait of its data. `name` is its name for people, and `said` its value.

    `numbers` belong to the value too. Two numbers are equal if their relative difference is at most `within`, because
    processors round differently.
    """

    name: Name
    said: Name = ""
    numbers: Annotated[list[float], msgspec.Meta(max_length=MOST_NUMBERS)] = []
    within: float = 0.0

    @property
    def text(self) -> str:
        """The value in words."""
        return self.said or " and ".join(f"{number:.6g}" for number in self.numbers)

    def agrees(self, other: Fact) -> bool:
        """Return whether two workers have this fact in common."""
        if (self.said, len(self.numbers)) != (other.said, len(other.numbers)):
            return False
        pairs = zip(self.numbers, other.numbers, strict=True)
        return all(a == b or math.isclose(a, b, rel_tol=self.within) or (math.isnan(a) and math.isnan(b)) for a, b in pairs)


Facts = Annotated[list[Fact], msgspec.Meta(max_length=MOST_FACTS)]


class FirstFacts(msgspec.Struct, frozen=True):
    """Facts, and the worker that has sent them first: 'worker-0 on HOST'."""

    by: Name
    facts: Facts


def difference(known: FirstFacts, other: Sequence[Fact], who: str) -> str:
    """Return a sentence on the first fact of `who` that differs from the facts sent first, or '' if none does.

    A fact that only one of the two has is not compared.
    """
    told = {fact.name: fact for fact in known.facts}
    for fact in other:
        before = told.get(fact.name)
        if before is not None and not fact.agrees(before):
            same = " with other values" if fact.text == before.text else ""
            return (
                f"{who} has {fact.name} {fact.text}{same} where {known.by} has {before.text}: every worker must run the same "
                "script on the same data."
            )
    return ""
