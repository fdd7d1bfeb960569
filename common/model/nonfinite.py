"""Gradients that are NaN or infinite: finding them, and what is said of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from roundtable.common.model.layout import Layout

#: What can be done where a run fails for one.
ADVICE = "--on-nonfinite skip drops such rounds, and allow lets them be."


def is_finite(values: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite. One quick pass: a sum is finite only if all that is added is; where it overflows
    although all are, they are looked at one by one."""
    return not values.is_floating_point() or math.isfinite(float(values.sum())) or bool(values.isfinite().all())


def tensors_not_finite(layout: Layout, contribution: Mapping[int, torch.Tensor]) -> str:
    """The names of tensors, three at most, in the first chunk of a contribution (flat tensors by chunk) in which some are not
    finite; '' where all are."""
    chunk = next((chunk for chunk, values in contribution.items() if not is_finite(values)), None)
    if chunk is None:
        return ""
    values = contribution[chunk]
    bad = [p for p in layout.chunks[chunk].pieces if not is_finite(values[p.offset : p.offset + p.length])]
    return " and ".join(f"'{layout.tensors[piece.tensor].name}'" for piece in bad[:3])


def sentence(worker: str, what: str, round_: int, lo: int, hi: int) -> str:
    """That a worker's gradient of `what` in micro-batches lo..hi-1 is not finite, without a full stop."""
    which = f"micro-batch {lo}" if hi == lo + 1 else f"micro-batches {lo}..{hi - 1}"
    return f"{worker}'s gradient of {what} in {which} of round {round_} is not finite"
