"""Types of numbers and lists in messages, with bounds. A header with a value beyond its bounds is malformed.

The bounds are checked when a message is decoded, but not when it is made.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

from msgspec import Meta

T = TypeVar("T")

#: Far above all real numbers of rounds, samples, bytes or elements. Far below the point where integers, or sums of some of them,
#: overflow in SQLite, torch or MessagePack.
LARGEST = 1 << 53

Count = Annotated[int, Meta(ge=0, le=LARGEST)]
Positive = Annotated[int, Meta(ge=1, le=LARGEST)]
#: A number, or -1 for none.
CountOrNone = Annotated[int, Meta(ge=-1, le=LARGEST)]
#: A finite number of 0 or more, such as seconds.
Amount = Annotated[float, Meta(ge=0, le=1e300)]
Name = Annotated[str, Meta(max_length=1000)]
#: A sentence, or a path.
Text = Annotated[str, Meta(max_length=8000)]

#: Most items of the longest lists: tensors, chunks or micro-batches. The size of a header is the tighter bound.
MOST = 1 << 20
Many = Annotated[list[T], Meta(max_length=MOST)]
Few = Annotated[list[T], Meta(max_length=1000)]
ByName = Annotated[dict[Name, T], Meta(max_length=1000)]

#: Settings of a parameter group. They must be plain values, because others could take long to hash.
Plain = int | float | bool | Name | None
Hypers = ByName[Plain | Few[Plain]]
