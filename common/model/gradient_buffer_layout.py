"""The layout of a worker's gradient buffers. Each has room for one contribution to all chunks."""

from __future__ import annotations

import warnings

import torch

from roundtable.common.model.layout import Layout, gradient_offsets
from roundtable.common.model.tensor_bytes import dtype_of
from roundtable.common.protocol.shared_memory import HEADER_BYTES, Region

#: Gradient buffers in the region that a worker shares. It seldom needs more than three. A contribution without one is sent.
GRADIENT_BUFFERS = 8


def gradient_buffer_bytes(layout: Layout) -> int:
    """Return the size of a gradient buffer in bytes."""
    return gradient_offsets(layout)[1]


def views(layout: Layout, memory: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return the chunks of a gradient buffer by id: flat tensors of each chunk's `sum_dtype` in the buffer's bytes, `memory`.

    The chunks of one tensor are neighbours.
    """
    offsets, _ = gradient_offsets(layout)
    return {c.id: memory[(at := offsets[c.id]) : at + c.sum_bytes].view(dtype_of(c.sum_dtype)) for c in layout.chunks}


def memory_of(layout: Layout, region: Region, gradient_buffer: int) -> torch.Tensor:
    """Return the bytes of one gradient buffer of a region. Raises IndexError if it does not exist."""
    size = gradient_buffer_bytes(layout)
    start = HEADER_BYTES + gradient_buffer * size
    if not 0 <= gradient_buffer < GRADIENT_BUFFERS or start + size > len(region.memory):
        raise IndexError(f"there is no gradient buffer {gradient_buffer}")
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a reader's mapping is read-only, and readers do not write
        return torch.frombuffer(region.memory, dtype=torch.uint8, count=size, offset=start)
