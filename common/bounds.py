"""Types of numbers and lists that messages carry, bounded where they are decoded: what lies beyond makes a header malformed.

Bounds hold for what is received; what is made here is not looked at.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

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
