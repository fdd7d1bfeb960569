"""The state of a shard, as one server sends it to another: chunks, embedding rows, and rows of sharded layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from roundtable.common.runtime.errors import WireError
from roundtable.ps.params.dense import DenseParameters
from roundtable.ps.params.embedding import RowTables
from roundtable.ps.params.state_part import Part, whole
from roundtable.ps.replication.state_transfer import Incoming
from roundtable.ps.sharded.layers import LayerShards


@dataclass(frozen=True)
class ShardState:
    """The weights and the optimizer state of one shard: the server's own or a copy of another one's."""

    store: DenseParameters
    tables: RowTables
    sharded_layers: LayerShards

    @property
    def is_between_rounds(self) -> bool:
        """Return True if no update is in progress, so that everything has the same version."""
        return self.sharded_layers.is_between_rounds

    def parts(self, seen: Mapping[int, torch.Tensor]) -> list[Part]:
        """Return all tensors as parts. `seen` is as in `DenseParameters.state`.

        Parts with rows share the rows' memory, so rows must not change until all parts have arrived. Other parts are copies.
        """
        return [*map(whole, self.store.state(seen)), *self.tables.parts(), *self.sharded_layers.parts()]

    def put(self, name: str, first: int, rows: torch.Tensor) -> None:
        """Store the rows of a part that has arrived. Raises WireError if this shard has no such rows."""
        if not self.tables.put(name, first, rows) and not self.sharded_layers.put(name, first, rows):
            raise WireError(f"rows of '{name[:100]}' from {first} on do not belong to this shard")

    def arrived(self, state: Incoming) -> None:
        """Load a state that has arrived in full. Its rows are in place already.

        Raises KeyError, RuntimeError or WireError if the state does not fit.
        """
        self.store.restore(state)
        self.tables.arrived(state, state.head.round)
        self.sharded_layers.arrived(state, state.head.round, state.head.pending, self.store.clipping.of_value)
