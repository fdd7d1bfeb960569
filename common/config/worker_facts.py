"""What workers must have in common beside model and plan, and how it is compared.

A worker that differs in silence trains something else, and the result depends on who was first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import msgspec

from roundtable.common.config.field_types import Name

#: Facts in a message, and numbers in a fact, at most.
MOST_FACTS, MOST_NUMBERS = 200, 64


class Fact(msgspec.Struct, frozen=True, array_like=True):
    """One of a worker's settings, or a trait of its data: `name` is what people call it, and `said` is what it is. `numbers` are
    more of what it is, in which a relative difference of `within` is none: other processors round otherwise."""

    name: Name
    said: Name = ""
    numbers: Annotated[list[float], msgspec.Meta(max_length=MOST_NUMBERS)] = []
    within: float = 0.0

    @property
    def text(self) -> str:
        """What it is, to be read."""
        return self.said or " and ".join(f"{number:.6g}" for number in self.numbers)

    def agrees(self, other: Fact) -> bool:
        """Whether two workers have this in common."""
        if (self.said, len(self.numbers)) != (other.said, len(other.numbers)):
            return False
        pairs = zip(self.numbers, other.numbers, strict=True)
        return all(a == b or math.isclose(a, b, rel_tol=self.within) or (math.isnan(a) and math.isnan(b)) for a, b in pairs)


Facts = Annotated[list[Fact], msgspec.Meta(max_length=MOST_FACTS)]


class FirstFacts(msgspec.Struct, frozen=True):
    """Facts, and who has told them first: 'worker-0 on HOST'."""

    by: Name
    facts: Facts


def difference(known: FirstFacts, other: Sequence[Fact], who: str) -> str:
    """A sentence on the first fact that `who` does not share with the one who told it first; '' where there is none. What only
    one of them has told is not compared."""
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
