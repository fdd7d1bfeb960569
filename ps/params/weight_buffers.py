"""The memory that a server's weights lie in: several weight buffers, each with room for one version of all its chunks.

Workers that share the memory compute right from it. So the server must not write to a weight buffer that a worker may read.
What workers ask for tells which these are: a worker reads the buffer that its model is in until it has got another one.
Two buffers are enough while all workers go along, and a worker that lags behind pins another. If no buffer is free, the server
takes that of the worker that lags most. The round that this worker computes is closed, so the server refuses its result.
Nothing here knows what a version means.

One more buffer, `home`, has the first weights of frozen chunks, which lie still until a worker contributes to them. The server
writes there once, so a reader of it is in nobody's way. Memory that nothing is written to takes up none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from roundtable.common.model.layout import Chunk, weight_offsets
from roundtable.common.model.tensor_bytes import dtype_of
from roundtable.common.protocol.shared_memory import HEADER_BYTES, Handle, NotShared, Region, create


class WeightBuffers:
    """`count` weight buffers for `chunks`, in shared memory if `shared` and there is any, else in this process's own."""

    def __init__(self, chunks: Sequence[Chunk], count: int, shared: bool) -> None:
        """Raises nothing where shared memory cannot be had: `refused` then says why."""
        self.refused = ""
        #: The number of the weight buffer for chunks that lie still.
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
        """What workers need to map the memory; None where it is not shared."""
        return self._region.handle if self._region is not None else None

    def __getitem__(self, weight_buffer: int) -> dict[int, torch.Tensor]:
        """The flat tensors, in the chunks' own dtypes, that a version's weights are written to, by chunk."""
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
    """Which weight buffer each worker may be reading."""

    def __init__(self) -> None:
        self._read: dict[str, set[int]] = {}

    def asks(self, worker: str, weight_buffer: int) -> None:
        """It asked for new weights, and until it has them reads `weight buffer` (-1: none)."""
        self._read[worker] = {weight_buffer}

    def sent(self, worker: str, weight_buffer: int) -> None:
        """It was told to read `weight buffer`, beside the one before."""
        self._read.setdefault(worker, set()).add(weight_buffer)

    def uses(self, worker: str, weight_buffer: int) -> None:
        """It has shown that it is at `weight buffer` and nothing else."""
        self._read[worker] = {weight_buffer}

    def forget(self, worker: str) -> None:
        """It reads no more, or nothing that matters."""
        self._read.pop(worker, None)

    @property
    def weight_buffers(self) -> set[int]:
        return {weight_buffer for weight_buffers in self._read.values() for weight_buffer in weight_buffers}
