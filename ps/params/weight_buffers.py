"""The memory that a server's weights are laid out in: several planes, each with room for one version of all its chunks.

Workers that share the memory compute right from it, so a plane must not be written to while someone may read it. Who that
is, follows from what workers ask for: a worker reads the plane that its model is in until it has got another. Two planes
are enough while all go along; one that lags behind pins another. Where there are no more, the plane of whoever lags most is
taken: the round it computes is closed, so whatever comes of it is refused. Nothing here knows what a version means.

One more plane, `home`, is for the first weights of frozen chunks, which lie still until somebody contributes to them. Nobody
writes there again, so a reader of it is in nobody's way. Memory that nothing is written to takes up none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from roundtable.common.model.layout import Chunk, weight_offsets
from roundtable.common.model.tensor_bytes import dtype_of
from roundtable.common.protocol.shared_memory import HEADER_BYTES, Handle, NotShared, Region, create


class WeightBuffers:
    """`count` planes for the weights of `chunks`, in shared memory if `shared` and there is any, else in this process's own."""

    def __init__(self, chunks: Sequence[Chunk], count: int, shared: bool) -> None:
        """Raises nothing where shared memory cannot be had: `refused` then says why."""
        self.refused = ""
        #: The number of the plane for chunks that lie still.
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

    def __getitem__(self, plane: int) -> dict[int, torch.Tensor]:
        """The flat tensors, in the chunks' own dtypes, that a version's weights are written to, by chunk."""
        if plane not in self._views:
            memory = self._memory(plane)
            self._views[plane] = {
                c.id: memory[(at := self._offsets[c.id]) : at + c.weight_bytes].view(dtype_of(c.dtype)) for c in self._chunks
            }
        return self._views[plane]

    def _memory(self, plane: int) -> torch.Tensor:
        if self._region is None:
            return torch.zeros(self._bytes, dtype=torch.uint8)
        start = HEADER_BYTES + plane * self._bytes
        return torch.frombuffer(self._region.memory, dtype=torch.uint8, count=self._bytes, offset=start)


class Readers:
    """Which plane each worker may be reading."""

    def __init__(self) -> None:
        self._read: dict[str, set[int]] = {}

    def asks(self, worker: str, plane: int) -> None:
        """It asked for new weights, and until it has them reads `plane` (-1: none)."""
        self._read[worker] = {plane}

    def sent(self, worker: str, plane: int) -> None:
        """It was told to read `plane`, beside the one before."""
        self._read.setdefault(worker, set()).add(plane)

    def uses(self, worker: str, plane: int) -> None:
        """It has shown that it is at `plane` and nothing else."""
        self._read[worker] = {plane}

    def forget(self, worker: str) -> None:
        """It reads no more, or nothing that matters."""
        self._read.pop(worker, None)

    @property
    def planes(self) -> set[int]:
        return {plane for planes in self._read.values() for plane in planes}
