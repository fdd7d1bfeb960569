"""The parts in which a shard's state moves from one server to another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from roundtable.common.storage.tensor_file import Entry


@dataclass(frozen=True)
class Part:
    """A tensor of a shard's state, or some of its rows."""

    name: str
    values: torch.Tensor
    #: The place of the first row in `values`, or -1 if `values` is the whole tensor.
    first: int = -1


def whole(entry: Entry) -> Part:
    """Return a whole tensor of a checkpoint as a part."""
    parts = list(entry.parts)
    return Part(entry.name, (parts[0] if len(parts) == 1 else torch.cat([p.reshape(-1) for p in parts])).view(entry.shape))
