"""Versions of a shard's weights, each in a weight buffer, where each round makes one."""

from __future__ import annotations

import torch

from roundtable.common.codecs.registry import sends_changes
from roundtable.common.config.settings import Settings
from roundtable.common.protocol.messages.gradients import Pull
from roundtable.ps.params.weight_buffers import Readers
from roundtable.ps.shard.checkpoint_writer import Source
from roundtable.ps.shard.model import ShardModel

#: Weight buffers: for the current version, the next one, and two for workers that lag behind.
BUFFERS = 4


class WeightVersions:
    """W(t) stays whole for workers that still need it, and so do earlier versions, as long as a worker reads them and there is
    room. W(t+1) is made chunk by chunk."""

    def __init__(self, model: ShardModel, settings: Settings, readers: Readers) -> None:
        self._model, self._readers = model, readers
        self._sends_changes = sends_changes(settings)
        #: Rounds that are applied.
        self.newest = 0
        #: By buffer, the version in it. That of `newest` is always among them.
        self._version_in: dict[int, int] = {0: 0}
        #: By buffer and chunk: frames of the weight codec.
        self._coded: dict[int, dict[int, memoryview]] = {}
        #: The buffer in which the next version is made, once it is begun.
        self.target: int | None = None

    def resume(self, version: int) -> None:
        """Begin with this version."""
        self.newest, self._version_in = version, {0: version}

    def place(self, source: Source | None) -> None:
        """Have the first weights in a buffer; if there is a checkpoint, those that workers computed from."""
        model = self._model
        model.frozen.place()
        model.frozen.note_changes(self.newest)
        buffer = self.buffer_of(self.newest)
        for chunk, into in model.buffers[buffer].items():
            if model.frozen.unchanged(chunk, self.newest):
                continue
            self._keep_frame(buffer, chunk, model.dense.place(chunk, into))
            if source is not None:
                model.dense.restore_seen(chunk, source.files, into)

    def of(self, version: int, chunk: int) -> torch.Tensor:
        """Return a chunk's weights of a version that is still here, or of the one that is being made."""
        buffer = self.buffer_of(version) if version <= self.newest else self.target
        if buffer is None or self._model.frozen.unchanged(chunk, version):
            buffer = self._model.buffers.home
        return self._model.buffers[buffer][chunk]

    def buffer_of(self, version: int) -> int:
        """Return the buffer with the weights of `version`, or -1."""
        return next((buffer for buffer, found in self._version_in.items() if found == version), -1)

    def next_of(self, chunk: int) -> torch.Tensor:
        """Return where a chunk's next weights are to be written. Begins the next version if need be."""
        if self.target is None:
            self.target = self._take_buffer()
        return self._model.buffers[self.target][chunk]

    def _take_buffer(self) -> int:
        """Return a buffer that nobody reads, else that of the worker that lags most."""
        current, read = self.buffer_of(self.newest), self._readers.weight_buffers
        free = [buffer for buffer in range(BUFFERS) if buffer != current and buffer not in read]
        others = [buffer for buffer in range(BUFFERS) if buffer != current]
        buffer = free[0] if free else min(others, key=lambda other: self._version_in.get(other, -1))
        self._version_in.pop(buffer, None)
        self._coded.pop(buffer, None)
        return buffer

    def written(self, chunk: int, frame: memoryview | None) -> None:
        """A chunk's next weights are in place. `frame` is what to send instead, if that is not None."""
        assert self.target is not None
        self._keep_frame(self.target, chunk, frame)
        self._model.frozen.note_changes(self.newest + 1)

    def _keep_frame(self, buffer: int, chunk: int, frame: memoryview | None) -> None:
        if frame is not None:
            self._coded.setdefault(buffer, {})[chunk] = frame

    def commit(self) -> None:
        """The next version is whole."""
        self.newest += 1
        if self.target is not None:
            self._version_in[self.target], self.target = self.newest, None
        else:  # a server without chunks, whose rows can be had one version back
            self._version_in = {self.newest % 2: self.newest, (self.newest - 1) % 2: self.newest - 1}

    def frames_for(self, pull: Pull, buffer: int) -> dict[int, memoryview]:
        """Return what to send instead of weights in `buffer`, which are those that were asked for. Changes are sent only to a
        worker that has what they change."""
        if self._sends_changes and pull.held_version != pull.for_round - 1:
            return {}
        return self._coded.get(buffer, {})
