"""The library that a training script uses: `run = roundtable.join()`, then see `roundtable.Run`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from roundtable.common.runtime.errors import ClusterError, NoAnswer, PsError, RunStopped, UsageError
from roundtable.worker.joining import embedding, join

if TYPE_CHECKING:
    from roundtable.worker.data.arguments import BatchArguments
    from roundtable.worker.data.orders import class_balanced_order, length_bucketed_order, weighted_order
    from roundtable.worker.data.streams.sources import stream_of
    from roundtable.worker.data.streams.stream import Stream
    from roundtable.worker.data.streams.tar_shards import tar_stream
    from roundtable.worker.layers.margin_losses import ArcFace, CosFace
    from roundtable.worker.layers.sharded_linear import ColumnParallelLinear, ShardedLinear, sharded_cross_entropy
    from roundtable.worker.run import Run

__all__ = [
    "ArcFace",
    "BatchArguments",
    "ClusterError",
    "ColumnParallelLinear",
    "CosFace",
    "NoAnswer",
    "PsError",
    "Run",
    "RunStopped",
    "ShardedLinear",
    "Stream",
    "UsageError",
    "class_balanced_order",
    "embedding",
    "join",
    "length_bucketed_order",
    "sharded_cross_entropy",
    "stream_of",
    "tar_stream",
    "weighted_order",
]

#: The names whose modules import torch, and those modules.
_NEED_TORCH = {
    "ArcFace": "worker.layers.margin_losses",
    "BatchArguments": "worker.data.arguments",
    "CosFace": "worker.layers.margin_losses",
    "ColumnParallelLinear": "worker.layers.sharded_linear",
    "ShardedLinear": "worker.layers.sharded_linear",
    "sharded_cross_entropy": "worker.layers.sharded_linear",
    "Run": "worker.run",
    "Stream": "worker.data.streams.stream",
    "class_balanced_order": "worker.data.orders",
    "length_bucketed_order": "worker.data.orders",
    "stream_of": "worker.data.streams.sources",
    "tar_stream": "worker.data.streams.tar_shards",
    "weighted_order": "worker.data.orders",
}


def __getattr__(name: str) -> Any:
    """Return a name that needs torch. Its module is imported at the first use."""
    if name not in _NEED_TORCH:
        raise AttributeError(f"module 'roundtable' has no attribute '{name}'")
    return getattr(importlib.import_module(f"roundtable.{_NEED_TORCH[name]}"), name)
