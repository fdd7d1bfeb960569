"""Contributions to a chunk and how two of them are added: the same on workers and servers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.layout import Kind


@dataclass
class Sum:
    """A contribution to one chunk, or a sum of several.

    `values` is flat, of the chunk's `sum_dtype`; bit p of `present` says that piece p had a gradient. `owned` memory may be
    written to; other memory belongs to a received frame. What is meant is `values` x `scale`, a power of two: multiplying by
    it changes no bit of what comes later, so it is put off until values are touched anyway.
    """

    values: torch.Tensor
    present: int
    owned: bool = False
    scale: float = 1.0

    def section(self, start: int, length: int) -> Sum:
        """Elements start .. start+length-1, in the same memory."""
        return Sum(self.values[start : start + length], self.present, self.owned, self.scale)


def weighted(values: torch.Tensor, present: int, samples: int, kind: Kind) -> Sum:
    """The contribution of a micro-batch with gradient `values`, which may be written to: times its samples."""
    if kind == "max":
        return Sum(values, present, owned=True)
    if samples & (samples - 1):
        return Sum(values.mul_(samples), present, owned=True)
    return Sum(values, present, owned=True, scale=float(samples))


def adder(kind: Kind) -> Callable[[Sum, Sum], Sum]:
    """The function (left, right) -> sum for chunks of a kind; it reuses owned memory. Buffers that are no floats take the
    maximum."""

    def add(left: Sum, right: Sum) -> Sum:
        out = left.values if left.owned else right.values if right.owned else torch.empty_like(left.values)
        scale = add_values(kind, left, right, out)
        return Sum(out, left.present | right.present, owned=True, scale=scale)

    return add


def add_values(kind: Kind, left: Sum, right: Sum, out: torch.Tensor) -> float:
    """Write the sum of two contributions to `out`, which may be the memory of one of them; returns the sum's scale."""
    if kind == "max":
        torch.maximum(left.values, right.values, out=out)
        return 1.0
    if left.scale == right.scale:
        torch.add(left.values, right.values, out=out)
        return left.scale
    a, b = left.values * left.scale, right.values * right.scale
    torch.add(a, b, out=out)
    return 1.0
