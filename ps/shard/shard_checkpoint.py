"""A server's part in one checkpoint after another: when its state is taken, and when that is complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import Enum, auto
from typing import Any, Protocol

import msgspec
import torch

from roundtable.common.protocol.effects import COORDINATOR, Send
from roundtable.common.protocol.messages.saving import CheckpointStatus, TakeCheckpoint
from roundtable.ps.shard.checkpoint_writer import CheckpointData
from roundtable.ps.shard.model import ShardModel


class Stage(Enum):
    """How far the newest checkpoint is."""

    IDLE = auto()
    #: The round of the checkpoint is not reached yet.
    AWAITS_ROUND = auto()
    #: All is taken but sharded layers, which get to the round later.
    AWAITS_LAYERS = auto()
    #: All is taken, and nobody has begun to write it.
    COMPLETE = auto()


class Checkpointed(Protocol):
    """What a checkpoint has to know of a shard."""

    @property
    def model(self) -> ShardModel: ...

    @property
    def version(self) -> int: ...

    @property
    def at_border(self) -> bool: ...

    @property
    def seen(self) -> Mapping[int, torch.Tensor]: ...

    def extra(self) -> dict[str, Any]: ...


class ShardCheckpoint:
    """The newest checkpoint that the coordinator has asked for."""

    def __init__(self) -> None:
        self.stage = Stage.IDLE
        self._request = TakeCheckpoint(-1, "")
        self._status = CheckpointStatus(-1, "waits")
        self._data = CheckpointData(-1, "", [], {})
        #: The version that sharded layers have to be at.
        self._layers_version = 0

    def ask(self, request: TakeCheckpoint, shard: Checkpointed | None, done: int) -> list[Send]:
        """Take a request, which may come several times, and say how far it is."""
        if self._status.round != request.round:
            self.stage, self._request, self._status = Stage.AWAITS_ROUND, request, CheckpointStatus(request.round, "waits")
            if shard is not None:
                self.round_closed(shard)
        if request.reached and self.stage is Stage.AWAITS_LAYERS and shard is not None:
            shard.model.layers.begin_update()
        return [Send(COORDINATOR, msgspec.structs.replace(self._status, done=done))]

    def round_closed(self, shard: Checkpointed) -> None:
        """Take the shard's state if this is the moment. Called whenever a round is closed."""
        request, model = self._request, shard.model
        if self.stage is not Stage.AWAITS_ROUND or shard.version < request.round:
            return
        if shard.version > request.round or not shard.at_border or not model.is_open:
            self.stage, self._status = Stage.IDLE, CheckpointStatus(request.round, "missed")
            return
        entries = list(model.entries(shard.seen, copies=not request.final))
        self._layers_version = model.layers.accepted
        self._data = CheckpointData(request.round, request.token, entries, shard.extra())
        self.stage, self._status = Stage.AWAITS_LAYERS, CheckpointStatus(request.round, "writing")

    def complete(self, model: ShardModel) -> None:
        """Add the sharded layers as soon as they have got there as well."""
        layers = model.layers
        if self.stage is Stage.AWAITS_LAYERS and (not layers or layers.version == self._layers_version):
            self._data = replace(self._data, entries=[*self._data.entries, *layers.state()])
            self.stage = Stage.COMPLETE

    def flush(self, model: ShardModel) -> None:
        """Complete a checkpoint now, as tables are about to change. A contribution to the next round proves that every server has
        closed the round of the checkpoint."""
        if self.stage is Stage.AWAITS_LAYERS:
            model.layers.finish_updates(self._layers_version)
            self.complete(model)

    def take(self) -> CheckpointData | None:
        """Return what is to be written, once."""
        if self.stage is not Stage.COMPLETE:
            return None
        data, self._data, self.stage = self._data, CheckpointData(-1, "", [], {}), Stage.IDLE
        return data

    def written(self, status: CheckpointStatus) -> list[Send]:
        """Tell the coordinator that a checkpoint is written, or could not be."""
        if self._status.round != status.round:
            return []
        self._status = status
        return [Send(COORDINATOR, status)]
