"""Where a worker's contributions lie: slots, each with room for one contribution to all chunks."""

from __future__ import annotations

import warnings

import torch

from roundtable.common.model.layout import Layout, gradient_offsets
from roundtable.common.model.tensor_bytes import dtype_of
from roundtable.common.protocol.shared_memory import HEADER_BYTES, Region

#: Slots in the region that a worker shares. It seldom needs more than three; what finds no free one is sent instead.
SLOTS = 8


def slot_bytes(layout: Layout) -> int:
    """What a slot takes up."""
    return gradient_offsets(layout)[1]


def views(layout: Layout, memory: torch.Tensor) -> dict[int, torch.Tensor]:
    """The chunks in a slot whose bytes are `memory`: flat, of each chunk's `sum_dtype`. Those of one tensor are neighbours."""
    offsets, _ = gradient_offsets(layout)
    return {c.id: memory[(at := offsets[c.id]) : at + c.sum_bytes].view(dtype_of(c.sum_dtype)) for c in layout.chunks}


def memory_of(layout: Layout, region: Region, slot: int) -> torch.Tensor:
    """The bytes of one slot of a region. Raises IndexError where there is no such slot."""
    size = slot_bytes(layout)
    start = HEADER_BYTES + slot * size
    if not 0 <= slot < SLOTS or start + size > len(region.memory):
        raise IndexError(f"there is no slot {slot}")
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a reader's mapping is read-only, and so is its use of it
        return torch.frombuffer(region.memory, dtype=torch.uint8, count=size, offset=start)
