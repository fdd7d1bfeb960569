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
    written to; other memory belongs to a received frame.
    """

    values: torch.Tensor
    present: int
    owned: bool = False


def adder(kind: Kind) -> Callable[[Sum, Sum], Sum]:
    """The function (left, right) -> sum for chunks of a kind; it reuses owned memory. Buffers that are no floats take the
    maximum."""
    operation = torch.maximum if kind == "max" else torch.add

    def add(left: Sum, right: Sum) -> Sum:
        out = left.values if left.owned else right.values if right.owned else torch.empty_like(left.values)
        return Sum(operation(left.values, right.values, out=out), left.present | right.present, owned=True)

    return add
