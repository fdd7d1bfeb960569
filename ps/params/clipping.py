"""Clipping by the norm of the whole gradient. Each server knows only the norms of its own part."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from roundtable.common.model.layout import Layout
from roundtable.common.protocol.messages.setup import Update

#: The 2-norm of a gradient: (tensor, start of the piece, norm).
Norm = tuple[int, int, float]


class Clipping:
    """Computes the clipping factor, by which all gradients of a round are multiplied."""

    def __init__(self, layout: Layout, update: Update) -> None:
        self._norm = update.clip_norm
        double = any(spec.dtype == "float64" for spec in layout.tensors if spec.group >= 0)
        self._dtype = torch.float64 if double else torch.float32

    @property
    def clips(self) -> bool:
        """Return True if gradients are clipped in this run."""
        return self._norm is not None

    def factor(self, norms: Sequence[Norm]) -> torch.Tensor | None:
        """Return the clipping factor, given the norms of all pieces on all servers in order. None: do not multiply.

        The arithmetic and the bits are those of `torch.nn.utils.clip_grad_norm_`. If a tensor is cut into chunks, the result may
        differ by rounding.
        """
        if self._norm is None or not norms:
            return None
        total = torch.linalg.vector_norm(torch.tensor([norm for _, _, norm in norms], dtype=self._dtype))
        return torch.clamp(self._norm / (total + 1e-6), max=1.0)

    def of_value(self, value: float | None) -> torch.Tensor | None:
        """Return the factor with this value as a tensor. None stays None."""
        return None if value is None else torch.tensor(value, dtype=self._dtype)


def value_of(factor: torch.Tensor | None) -> float | None:
    """Return a factor as a number. None stays None."""
    return None if factor is None else float(factor)
