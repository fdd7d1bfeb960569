"""Checks that a machine has enough memory for a server's shard, before the server allocates it."""

from __future__ import annotations

import os

import torch

from roundtable.common.model.layout import Layout
from roundtable.common.model.sparse_rows import rows_on
from roundtable.common.protocol.messages.setup import Update
from roundtable.common.protocol.model_spec import ShardedLayerSpec
from roundtable.common.runtime.errors import WireError
from roundtable.ps.params.embedding import first_state


def check_memory(layout: Layout, server: int, update: Update, device: torch.device, replicas: int) -> None:
    """Raise WireError if this machine has less memory than the chunks and the sharded layers take.

    Chunks count with their weights and masters. Sharded layers count with their optimizer state: once if the CPU computes them,
    and once more if this server keeps a copy. Embedding tables do not count, because they take memory as they are used.
    """
    dense = sum(chunk.weight_bytes + (0 if chunk.frozen else chunk.sum_bytes) for chunk in layout.on(server))
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if dense > there:
        raise WireError(f"the model takes {dense >> 30} GiB on this server, whose machine has {there >> 30}")
    shards = (device.type == "cpu") + replicas
    a_row = [shards * 4 * spec.dim * (1 + _states(update, spec)) for spec in layout.sharded_layers]
    here = sum(size * rows_on(server, layout.servers, spec.rows) for size, spec in zip(a_row, layout.sharded_layers, strict=True))
    if dense + here > there:
        whole = sum(size * spec.rows for size, spec in zip(a_row, layout.sharded_layers, strict=True))
        least = max(-(-whole // there), layout.servers + 1)
        count = f"{layout.servers} server{'s' * (layout.servers > 1)}"
        names = " and ".join(f"'{spec.name}'" for spec in layout.sharded_layers)
        raise WireError(
            f"{names} {'takes' if len(a_row) == 1 else 'take'} {here / 2**30:.1f} GiB with the optimizer's state on each of "
            f"{count}, and this machine has {there / 2**30:.1f}: use at least {least} servers on machines of "
            "their own"
        )


def _states(update: Update, spec: ShardedLayerSpec) -> int:
    """Return how many tensors of a row's shape the optimizer keeps."""
    first = first_state(update, spec).values()
    return sum(isinstance(value, torch.Tensor) and value.shape == (1, spec.dim) for value in first)
