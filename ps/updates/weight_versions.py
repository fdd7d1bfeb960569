"""The versions of a shard's weights, each in a weight buffer. Every round makes one."""

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
    """The versions of a shard's weights and their weight buffers.

    The newest version W(t) stays whole. Earlier versions stay while workers read them and there is room. W(t+1) is made chunk by
    chunk.
    """

    def __init__(self, model: ShardModel, settings: Settings, readers: Readers) -> None:
        self._model, self._readers = model, readers
        self._sends_changes = sends_changes(settings)
        #: The newest whole version: the number of applied rounds.
        self.newest = 0
        #: By weight buffer: the version in it. `newest` is always among them.
        self._version_in: dict[int, int] = {0: 0}
        #: By weight buffer and chunk: frames of the weight codec.
        self._coded: dict[int, dict[int, memoryview]] = {}
        #: The weight buffer in which the next version is being made, or None.
        self.target: int | None = None

    def resume(self, version: int) -> None:
        """Start at `version`."""
        self.newest, self._version_in = version, {0: version}

    def place(self, source: Source | None) -> None:
        """Write the first weights to a weight buffer, or those that workers computed from, if `source` is a checkpoint."""
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
        """Return a chunk's weights of a version that is still in a weight buffer, or of the next version."""
        buffer = self.buffer_of(version) if version <= self.newest else self.target
        if buffer is None or self._model.frozen.unchanged(chunk, version):
            buffer = self._model.buffers.home
        return self._model.buffers[buffer][chunk]

    def buffer_of(self, version: int) -> int:
        """Return the weight buffer that holds `version`, or -1."""
        return next((buffer for buffer, found in self._version_in.items() if found == version), -1)

    def next_of(self, chunk: int) -> torch.Tensor:
        """Return the memory for a chunk's next weights. If the next version has no weight buffer, take one."""
        if self.target is None:
            self.target = self._take_buffer()
        return self._model.buffers[self.target][chunk]

    def _take_buffer(self) -> int:
        """Return a weight buffer that no worker reads. If there is none, return the one with the oldest version."""
        current, read = self.buffer_of(self.newest), self._readers.weight_buffers
        free = [buffer for buffer in range(BUFFERS) if buffer != current and buffer not in read]
        others = [buffer for buffer in range(BUFFERS) if buffer != current]
        buffer = free[0] if free else min(others, key=lambda other: self._version_in.get(other, -1))
        self._version_in.pop(buffer, None)
        self._coded.pop(buffer, None)
        return buffer

    def written(self, chunk: int, frame: memoryview | None) -> None:
        """Record that a chunk's next weights are written. `frame`, if not None, is sent instead of them."""
        assert self.target is not None
        self._keep_frame(self.target, chunk, frame)
        self._model.frozen.note_changes(self.newest + 1)

    def _keep_frame(self, buffer: int, chunk: int, frame: memoryview | None) -> None:
        if frame is not None:
            self._coded.setdefault(buffer, {})[chunk] = frame

    def commit(self) -> None:
        """Make the next version the newest one."""
        self.newest += 1
        if self.target is not None:
            self._version_in[self.target], self.target = self.newest, None
        else:  # a server without chunks: workers may ask for its rows one version back
            self._version_in = {self.newest % 2: self.newest, (self.newest - 1) % 2: self.newest - 1}

    def frames_for(self, pull: Pull, buffer: int) -> dict[int, memoryview]:
        """Return by chunk the frames to send instead of the weights in `buffer`, which are those that `pull` asks for.

        If the codec sends changes, only a worker that has the version before gets these frames.
        """
        if self._sends_changes and pull.held_version != pull.for_round - 1:
            return {}
        return self._coded.get(buffer, {})
