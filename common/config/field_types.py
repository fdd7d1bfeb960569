"""Types of numbers and lists that messages carry, bounded where they are decoded: what lies beyond makes a header malformed.

Bounds hold for what is received; what is made here is not looked at.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

from msgspec import Meta

T = TypeVar("T")

#: Far above every number of rounds, samples, bytes or elements there is, and far below where integers overflow in SQLite,
#: torch or MessagePack, sums of some of them included.
LARGEST = 1 << 53

Count = Annotated[int, Meta(ge=0, le=LARGEST)]
Positive = Annotated[int, Meta(ge=1, le=LARGEST)]
#: A number, or -1 for none.
CountOrNone = Annotated[int, Meta(ge=-1, le=LARGEST)]
#: Finite and 0 or more, such as seconds.
Amount = Annotated[float, Meta(ge=0, le=1e300)]
Name = Annotated[str, Meta(max_length=1000)]
#: A sentence, or a path.
Text = Annotated[str, Meta(max_length=8000)]

#: Items that the longest lists may have: tensors, chunks or micro-batches. The size of a header is the tighter bound.
MOST = 1 << 20
Many = Annotated[list[T], Meta(max_length=MOST)]
Few = Annotated[list[T], Meta(max_length=1000)]
ByName = Annotated[dict[Name, T], Meta(max_length=1000)]

#: Settings of a parameter group: plain values, for a key or value of any type could be one that takes long to hash.
Plain = int | float | bool | Name | None
Hypers = ByName[Plain | Few[Plain]]
