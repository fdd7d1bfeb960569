"""Kinds of settings: numbers in bounds, with a help text."""

from __future__ import annotations

import math
from typing import Annotated

import msgspec
from msgspec import Meta

from roundtable.common.runtime.errors import UsageError

Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]


def doc(text: str) -> Meta:
    """Return the part of a field's type that has its help text."""
    return Meta(description=text)


def check_finite(settings: msgspec.Struct) -> None:
    """Raise UsageError if a number is infinite or NaN."""
    for key in settings.__struct_fields__:
        value = getattr(settings, key)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{key} must be a finite number (got {value}).")
