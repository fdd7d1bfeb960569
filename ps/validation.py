"""Checks of well-formed messages whose values make no sense. They run first, so that a refused message has no effect."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from roundtable.common.protocol.messages.setup import InFile, Setup, Update
from roundtable.common.runtime.errors import WireError
from roundtable.common.storage.safetensors_header import size_of

#: A parameter group has at most this many settings, and one setting at most this many numbers.
_SETTINGS = 1000


def check_setup(setup: Setup) -> None:
    """Raise WireError if a model names parameter groups that its update lacks, or if the update's settings are not valid."""
    update, groups = setup.update, len(setup.update.groups)
    named = [spec.group for spec in setup.tensors] + [spec.group for spec in (*setup.tables, *setup.sharded_layers)]
    if any(group >= groups for group in named):
        raise WireError(f"a model has parameters in groups beyond the {groups} that its optimizer has")
    if update.classes and len(update.classes) != groups:
        raise WireError(f"an update has classes for {len(update.classes)} parameter groups of {groups}")
    if update.clip_norm is not None and not update.clip_norm > 0:
        raise WireError(f"a gradient cannot be clipped to the norm {update.clip_norm}")
    for group in update.groups:
        if len(group) > _SETTINGS or "params" in group or not all(_is_plain(value) for value in group.values()):
            raise WireError("the optimizer's settings are not plain values")


def check_hypers(hypers: Sequence[Mapping[str, Any]], update: Update) -> None:
    """Raise WireError unless `hypers` are settings of the update's groups, with values of the same types, and finite."""
    if not hypers:
        return
    if len(hypers) != len(update.groups):
        raise WireError(f"a push has settings for {len(hypers)} parameter groups where there are {len(update.groups)}")
    for given, first in zip(hypers, update.groups, strict=True):
        for key, value in given.items():
            if key == "nesterov" and key in first and isinstance(value, bool):
                continue  # post-local SGD turns nesterov on later, and torch reads it at every step
            if key not in first or not _is_like(value, first[key]):
                raise WireError(f"a push sets the optimizer's {key[:100]} to {str(value)[:100]}, which is not allowed")


def check_distinct(ids: Sequence[int], known: Collection[int], what: str) -> None:
    """Raise WireError, with `what`, unless `ids` are distinct and all in `known`."""
    if len(ids) > len(known) or len(set(ids)) != len(ids) or not all(i in known for i in ids):
        raise WireError(f"{what} names chunks {list(ids[:20])!s}: some are not here, or named twice")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= _SETTINGS and all(_is_plain(item) and not isinstance(item, list | tuple) for item in value)
    return value is None or isinstance(value, bool | str) or _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_like(value: Any, first: Any) -> bool:
    """Return True if a setting may change from `first` to `value`. Only numbers may change."""
    if isinstance(first, list | tuple) and isinstance(value, list | tuple):
        return len(first) == len(value) and all(_is_like(a, b) for a, b in zip(value, first, strict=True))
    if _is_number(first):
        return _is_number(value) and abs(value) <= 1e300
    return type(value) is type(first) and bool(value == first)


def check_file(file: Sequence[InFile], sizes: Sequence[int]) -> None:
    """Raise WireError unless `file` can be the tensors of the model's file. `sizes` are the bytes of the model's tensors."""
    if len({entry.name for entry in file}) != len(file):
        raise WireError("the model's file has two tensors of one name")
    for entry in file:
        try:
            size = size_of(entry.dtype, entry.shape)
        except KeyError:
            raise WireError(f"'{entry.name[:100]}' has dtype '{entry.dtype[:100]}', which safetensors has no name for") from None
        if any(number >= len(sizes) for number in entry.of) or size != sum(sizes[number] for number in entry.of):
            raise WireError(f"'{entry.name[:100]}' in the model's file is {entry.dtype} {entry.shape}, but the model's is not")
