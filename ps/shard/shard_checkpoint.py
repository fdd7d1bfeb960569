"""Decides when a shard's state is captured for a checkpoint, and when the captured state is complete."""

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

_NOTHING = CheckpointData(-1, "", [], {})


class Stage(Enum):
    """The stage of the newest checkpoint."""

    #: Nothing is left to capture. A thread may be writing the newest checkpoint.
    IDLE = auto()
    #: The shard has not reached the checkpoint's round.
    AWAITS_ROUND = auto()
    #: All state is captured except sharded layers, which reach the round later.
    AWAITS_LAYERS = auto()
    #: All state is captured, and the write has not begun.
    COMPLETE = auto()


class Checkpointed(Protocol):
    """The part of `Shard` that a checkpoint needs."""

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
        self._data = _NOTHING
        #: The version that sharded layers must reach before they are captured.
        self._layers_version = 0

    def ask(self, request: TakeCheckpoint, shard: Checkpointed | None, done: int) -> list[Send]:
        """Take a request, which may come several times. Return the status for the coordinator.

        `done` is a count of progress, which the status carries.
        """
        if self._status.round != request.round:
            self.stage, self._request, self._status = Stage.AWAITS_ROUND, request, CheckpointStatus(request.round, "waits")
            self._data = _NOTHING  # of an earlier request, which the coordinator has given up
            if shard is not None:
                self.round_closed(shard)
        if request.reached and self.stage is Stage.AWAITS_LAYERS and shard is not None:
            shard.model.layers.begin_update()
        return [Send(COORDINATOR, msgspec.structs.replace(self._status, done=done))]

    def round_closed(self, shard: Checkpointed) -> None:
        """Capture the shard's state if the checkpoint's round is reached. Called whenever a round is closed."""
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
        """Add the sharded layers once they have reached the checkpoint's round."""
        layers = model.layers
        if self.stage is Stage.AWAITS_LAYERS and (not layers or layers.version == self._layers_version):
            self._data = replace(self._data, entries=[*self._data.entries, *layers.state()])
            self.stage = Stage.COMPLETE

    def flush(self, model: ShardModel) -> None:
        """Complete a checkpoint now, before tables change.

        This is safe: a contribution to the next round proves that every server has closed the checkpoint's round.
        """
        if self.stage is Stage.AWAITS_LAYERS:
            model.layers.finish_updates(self._layers_version)
            self.complete(model)

    def take(self) -> CheckpointData | None:
        """Return the complete state to write, once, else None."""
        if self.stage is not Stage.COMPLETE:
            return None
        data, self._data, self.stage = self._data, _NOTHING, Stage.IDLE
        return data

    def written(self, status: CheckpointStatus) -> list[Send]:
        """Return a message that tells the coordinator whether the checkpoint was written."""
        if self._status.round != status.round:
            return []
        self._status = status
        return [Send(COORDINATOR, status)]
