"""The kinds of parameters beside chunks: embedding rows and sharded layers.

Each kind has its own message type. One push of that type contributes to all parameters of the kind.
A round files contributions by number: the chunk's id, or one of the negative numbers here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from roundtable.common.model.layout import Layout
from roundtable.common.model.sparse_rows import RowSums, add_tables, cut, cut_sums, no_rows
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.embedding import RowAck, RowPush
from roundtable.common.protocol.messages.replication import ReplicateLayers, ReplicateRows
from roundtable.common.protocol.messages.sharded import LayerAck, LayerPush
from roundtable.common.protocol.transport import Frames
from roundtable.ps.params.clipping import Norm, value_of
from roundtable.ps.params.embedding import RowTables
from roundtable.ps.params.planned_rates import Hypers
from roundtable.ps.sharded.contributions import LayerContribution, replicated, tensors_of
from roundtable.ps.sharded.layers import LayerShards

#: The number under which server 0 files the metrics of a contribution.
METRICS = -1
#: The number of the weights of contributions.
WEIGHTS = -4


class ParameterKind(ABC):
    """All parameters of one kind on one server. `total` is the sum of the contributions of a round, or of one push."""

    #: The number under which a round files contributions to this kind.
    number: int
    #: The message type of its pushes.
    push_type: type[Body]
    #: The word for its parameters in error messages.
    noun: str
    #: True if `close` changes rows at once. Then nobody may read the rows meanwhile. Otherwise `work` changes them later.
    changes_at_once: bool

    @abstractmethod
    def __bool__(self) -> bool:
        """Return True if this server has parameters of this kind."""

    @abstractmethod
    def ack(self, push: Any) -> RowAck | LayerAck:
        """Return the acknowledgement of a push."""

    @abstractmethod
    def receive(self, sender: str, push: Any, frames: Frames) -> Any:
        """Return a push's contribution. Raises WireError if it does not fit."""

    @abstractmethod
    def add(self, left: Any, right: Any) -> Any:
        """Return the sum of two contributions."""

    @abstractmethod
    def nothing(self) -> Any:
        """Return the empty contribution, which stands for a dropped round."""

    @abstractmethod
    def norms(self, total: Any, weight: float) -> list[Norm] | None:
        """Return the norms of the mean gradient, or None while they are being computed."""

    @abstractmethod
    def replicated(
        self, round_: int, total: Any, weight: float, hypers: Hypers, factor: torch.Tensor | None
    ) -> tuple[ReplicateRows | ReplicateLayers, Frames]:
        """Return the message and frames from which the backup makes the same update."""

    @abstractmethod
    def close(self, total: Any, weight: float, hypers: Hypers, factor: torch.Tensor | None) -> None:
        """Update with the contributions of a whole round. `factor` is the clipping factor, None without clipping."""

    @abstractmethod
    def apply(self, total: Any, round_: int, weight: float, hypers: Hypers, lr_scale: float) -> None:
        """Update with the contribution of one push. `lr_scale` multiplies the learning rate."""


class RowsKind(ParameterKind):
    """The embedding rows of all tables."""

    number, push_type, noun, changes_at_once = -2, RowPush, "rows", True

    def __init__(self, tables: RowTables, layout: Layout) -> None:
        self._tables, self._specs = tables, layout.tables

    def __bool__(self) -> bool:
        return bool(self._tables)

    def ack(self, push: RowPush) -> RowAck:
        return RowAck(push.round, push.lo, push.hi)

    def receive(self, sender: str, push: RowPush, frames: Frames) -> RowSums:
        return self._tables.receive(push, frames, f"a push of {sender}")

    def add(self, left: RowSums, right: RowSums) -> RowSums:
        return add_tables(left, right)

    def nothing(self) -> RowSums:
        return [no_rows(spec) for spec in self._specs]

    def norms(self, total: RowSums, weight: float) -> list[Norm]:
        return self._tables.norms(total, weight)

    def replicated(
        self, round_: int, total: RowSums, weight: float, hypers: Hypers, factor: torch.Tensor | None
    ) -> tuple[ReplicateRows, Frames]:
        counts = [part.count for part in total]
        return ReplicateRows(round_, weight, counts, [dict(one) for one in hypers], value_of(factor)), cut_sums(total)

    def close(self, total: RowSums, weight: float, hypers: Hypers, factor: torch.Tensor | None) -> None:
        self._tables.apply(total, weight, hypers, factor=factor)

    def apply(self, total: RowSums, round_: int, weight: float, hypers: Hypers, lr_scale: float) -> None:
        self._tables.apply(total, weight, hypers, lr_scale)


class LayersKind(ParameterKind):
    """All sharded layers."""

    number, push_type, noun, changes_at_once = -3, LayerPush, "classes", False

    def __init__(self, layers: LayerShards) -> None:
        self._layers = layers

    def __bool__(self) -> bool:
        return bool(self._layers)

    def ack(self, push: LayerPush) -> LayerAck:
        return LayerAck(push.round, push.lo, push.hi)

    def receive(self, sender: str, push: LayerPush, frames: Frames) -> list[LayerContribution]:
        return self._layers.receive(sender, push, frames)

    def add(self, left: list[LayerContribution], right: list[LayerContribution]) -> list[LayerContribution]:
        return [*left, *right]

    def nothing(self) -> list[LayerContribution]:
        return []

    def norms(self, total: list[LayerContribution], weight: float) -> list[Norm] | None:
        return self._layers.norms(total, weight)

    def replicated(
        self, round_: int, total: list[LayerContribution], weight: float, hypers: Hypers, factor: torch.Tensor | None
    ) -> tuple[ReplicateLayers, Frames]:
        frames = [frame for tensor in tensors_of(total) for frame in cut(tensor)]
        return replicated(round_, total, weight, hypers, factor), frames

    def close(self, total: list[LayerContribution], weight: float, hypers: Hypers, factor: torch.Tensor | None) -> None:
        self._layers.close(total, weight, hypers, factor)

    def apply(self, total: list[LayerContribution], round_: int, weight: float, hypers: Hypers, lr_scale: float) -> None:
        self._layers.apply(total, round_, weight, hypers, lr_scale)
