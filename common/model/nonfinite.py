"""Gradients that are NaN or infinite: finding them, and the messages about them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from roundtable.common.model.layout import Layout

#: Advice for a run that fails because of such a gradient.
ADVICE = "--on-nonfinite skip drops such rounds, and allow takes them."


def is_finite(values: torch.Tensor) -> bool:
    """Return whether no element is NaN or infinite.

    A finite sum proves it in one fast pass. If the sum is not finite, it may have overflowed, so the elements are tested one by
    one.
    """
    return not values.is_floating_point() or math.isfinite(float(values.sum())) or bool(values.isfinite().all())


def tensors_not_finite(layout: Layout, contribution: Mapping[int, torch.Tensor]) -> str:
    """Return the names of tensors that are not finite, or '' if there are none.

    `contribution` has flat tensors by chunk. At most three names are returned, from the first chunk with such a tensor.
    """
    chunk = next((chunk for chunk, values in contribution.items() if not is_finite(values)), None)
    if chunk is None:
        return ""
    values = contribution[chunk]
    bad = [p for p in layout.chunks[chunk].pieces if not is_finite(values[p.offset : p.offset + p.length])]
    return " and ".join(f"'{layout.tensors[piece.tensor].name}'" for piece in bad[:3])


def sentence(worker: str, what: str, round_: int, lo: int, hi: int) -> str:
    """Return that a worker's gradient of `what` in micro-batches lo..hi-1 is not finite, without a full stop."""
    which = f"micro-batch {lo}" if hi == lo + 1 else f"micro-batches {lo}..{hi - 1}"
    return f"{worker}'s gradient of {what} in {which} of round {round_} is not finite"
