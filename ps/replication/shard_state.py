"""All numbers of a shard, as one server sends them to another: chunks, rows of tables, and rows of sharded layers."""

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
    """What a server holds of its shard, or of another one's."""

    store: DenseParameters
    tables: RowTables
    sharded_layers: LayerShards

    @property
    def is_between_rounds(self) -> bool:
        """Whether all of it is as after some round, with no update under way."""
        return self.sharded_layers.is_between_rounds

    def parts(self, seen: Mapping[int, torch.Tensor]) -> list[Part]:
        """Everything; `seen` as in Store.state. Rows are sent from where they are, so they must stay as they are until all has
        arrived; of the rest this is a copy."""
        return [*map(whole, self.store.state(seen)), *self.tables.parts(), *self.sharded_layers.parts()]

    def put(self, name: str, first: int, rows: torch.Tensor) -> None:
        """Rows of a part that has come. Raises WireError where there are none such."""
        if not self.tables.put(name, first, rows) and not self.sharded_layers.put(name, first, rows):
            raise WireError(f"rows came of '{name[:100]}', which is not here, from the {first}th on")

    def arrived(self, state: Incoming) -> None:
        """Have the state that has come, whose rows are here already. Raises KeyError, RuntimeError or WireError where it does not
        fit."""
        self.store.restore(state)
        self.tables.arrived(state, state.head.round)
        self.sharded_layers.arrived(state, state.head.round, state.head.pending, self.store.clipping.of_value)
