"""A part of a shard's state, as it moves from server to server."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from roundtable.common.storage.tensor_file import Entry


@dataclass(frozen=True)
class Part:
    """A tensor of a shard's state, or those of its rows from `first` on."""

    name: str
    values: torch.Tensor
    first: int = -1


def whole(entry: Entry) -> Part:
    """A tensor of a checkpoint as a part."""
    parts = list(entry.parts)
    return Part(entry.name, (parts[0] if len(parts) == 1 else torch.cat([p.reshape(-1) for p in parts])).view(entry.shape))
