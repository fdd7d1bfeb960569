"""A server's weight buffers. Each has room for one version of all the server's chunks.

A worker that shares the memory computes right from it. So the server must not write to a weight buffer that a worker may read. A
worker's pulls say which buffer that is: the worker reads the buffer that its model lies in until it has got another one. Two
buffers are enough while all workers keep up. A worker that lags behind pins another one. If no buffer is free, the server takes
the one of the worker that lags most. The round that this worker computes is closed, so the server refuses its result.

One more buffer, `home`, has the first weights of frozen chunks. They stay there until a worker contributes to them. The server
writes to `home` once, so its readers block nothing. The operating system allocates a buffer's memory only as it is written to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from roundtable.common.model.layout import Chunk, weight_offsets
from roundtable.common.model.tensor_bytes import dtype_of
from roundtable.common.protocol.shared_memory import HEADER_BYTES, Handle, NotShared, Region, create


class WeightBuffers:
    """`count` weight buffers for `chunks`, and `home`. They lie in shared memory if `shared` is True and it is available."""

    def __init__(self, chunks: Sequence[Chunk], count: int, shared: bool) -> None:
        """Allocate the buffers. If shared memory is not available, use this process's own memory and set `refused`."""
        #: Why shared memory is not available, or "".
        self.refused = ""
        #: The number of the weight buffer for the first weights of frozen chunks.
        self.home = count
        self._chunks = chunks
        self._offsets, self._bytes = weight_offsets(chunks)
        self._region: Region | None = None
        self._views: dict[int, dict[int, torch.Tensor]] = {}
        if shared and chunks:
            try:
                self._region = create((count + 1) * self._bytes)
            except NotShared as error:
                self.refused = str(error)

    @property
    def handle(self) -> Handle | None:
        """Return the handle with which workers map the memory, or None if it is not shared."""
        return self._region.handle if self._region is not None else None

    def __getitem__(self, weight_buffer: int) -> dict[int, torch.Tensor]:
        """Return by chunk the flat tensors of a weight buffer, in the chunks' own dtypes."""
        if weight_buffer not in self._views:
            memory = self._memory(weight_buffer)
            self._views[weight_buffer] = {
                c.id: memory[(at := self._offsets[c.id]) : at + c.weight_bytes].view(dtype_of(c.dtype)) for c in self._chunks
            }
        return self._views[weight_buffer]

    def _memory(self, weight_buffer: int) -> torch.Tensor:
        if self._region is None:
            return torch.zeros(self._bytes, dtype=torch.uint8)
        start = HEADER_BYTES + weight_buffer * self._bytes
        return torch.frombuffer(self._region.memory, dtype=torch.uint8, count=self._bytes, offset=start)


class Readers:
    """The weight buffers that each worker may be reading."""

    def __init__(self) -> None:
        self._read: dict[str, set[int]] = {}

    def asks(self, worker: str, weight_buffer: int) -> None:
        """Record that the worker asked for new weights. Until they come it reads `weight_buffer` (-1: none)."""
        self._read[worker] = {weight_buffer}

    def sent(self, worker: str, weight_buffer: int) -> None:
        """Record that the worker was sent to `weight_buffer`. It may still read the one before."""
        self._read.setdefault(worker, set()).add(weight_buffer)

    def uses(self, worker: str, weight_buffer: int) -> None:
        """Record that the worker has shown that it reads `weight_buffer` and no other."""
        self._read[worker] = {weight_buffer}

    def forget(self, worker: str) -> None:
        """Record that the worker is lost: what it reads does not matter any more."""
        self._read.pop(worker, None)

    @property
    def weight_buffers(self) -> set[int]:
        """Return all weight buffers that a worker may be reading."""
        return {weight_buffer for weight_buffers in self._read.values() for weight_buffer in weight_buffers}
