"""How a codec applies to the chunks of a layout. Only large weights are compressed; the rest of a chunk is sent as it is.

Biases, norms and small tensors have few bytes and matter most to convergence, so they are not compressed. PowerSGD and most
others do the same (Vogels, Karimireddy and Jaggi, NeurIPS 2019). Buffers are not compressed either, because they are no
gradients.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from roundtable.common.codecs import Codec, Coded, State
from roundtable.common.model.layout import Chunk, Layout, Piece
from roundtable.common.model.tensor_bytes import from_frame
from roundtable.common.runtime.errors import WireError

#: Tensors with fewer elements are not compressed.
MIN_NUMEL = 1024
#: A chunk with a larger value is not compressed, because sums in codecs would overflow.
LARGEST = 1e30

Run = tuple[int, int]


def coded_pieces(layout: Layout, chunk: Chunk) -> list[Piece]:
    """Return the pieces of `chunk` that are compressed: of float32 parameters with at least two dimensions and 1,024 elements."""
    if chunk.kind != "param" or chunk.dtype != "float32":
        return []
    tensors = layout.tensors
    return [p for p in chunk.pieces if len(tensors[p.tensor].shape) >= 2 and tensors[p.tensor].numel >= MIN_NUMEL]


def coded_runs(layout: Layout, chunk: Chunk) -> list[Run]:
    """Return (start, length) of each run of the chunk's elements that is compressed, ascending and with gaps between them."""
    runs: list[Run] = []
    for piece in coded_pieces(layout, chunk):
        if runs and sum(runs[-1]) == piece.offset:
            runs[-1] = (runs[-1][0], runs[-1][1] + piece.length)
        else:
            runs.append((piece.offset, piece.length))
    return runs


@dataclass(frozen=True)
class _Cut:
    """A chunk's elements. Those in runs are compressed, those in gaps are not."""

    numel: int
    runs: list[Run]
    gaps: list[Run]

    @property
    def coded(self) -> int:
        """Number of elements that are compressed."""
        return sum(length for _, length in self.runs)


class ChunkCodec:
    """Encodes and decodes whole chunks.

    A frame has the elements outside the runs, float32, in order, and then the codec's frame for all runs, one after the other.
    """

    def __init__(self, codec: Codec, layout: Layout) -> None:
        self.codec = codec
        self._cuts = [_cut(chunk.numel, coded_runs(layout, chunk)) for chunk in layout.chunks]
        #: Seconds spent so far.
        self.encode_seconds = 0.0
        self.decode_seconds = 0.0

    def covers(self, chunk_id: int) -> bool:
        """Return whether a part of the chunk is compressed."""
        return bool(self._cuts[chunk_id].runs)

    def _compressed(self, chunk_id: int) -> _Cut:
        """Return how a chunk is cut. Raises WireError if no part of it is compressed."""
        if not 0 <= chunk_id < len(self._cuts) or not self._cuts[chunk_id].runs:
            raise WireError(f"chunk {chunk_id} is not one that is compressed")
        return self._cuts[chunk_id]

    def encode(self, chunk_id: int, values: torch.Tensor, seed: int, state: State | None) -> Coded | None:
        """Return the frame for a chunk's `values` (flat, float32) and the new state. See Codec.encode. The state covers the runs.

        Return None if the chunk must be sent as it is; the state does not change then. In such a chunk no part is compressed,
        or a value in a run is NaN, infinite or beyond 1e30.
        """
        began = time.perf_counter()
        try:
            return self._encode(self._cuts[chunk_id], values, seed, state)
        finally:
            self.encode_seconds += time.perf_counter() - began

    def _encode(self, cut: _Cut, values: torch.Tensor, seed: int, state: State | None) -> Coded | None:
        if not cut.runs:
            return None
        inside = _gather(values, cut.runs)
        low, high = torch.aminmax(inside)  # both are NaN if any element is
        if not (low >= -LARGEST and high <= LARGEST):
            return None
        coded = self.codec.encode(inside, seed, state)
        if not cut.gaps:
            return coded
        return Coded(torch.cat([_gather(values, cut.gaps).view(torch.uint8), coded.frame]), coded.state)

    def decode(self, chunk_id: int, frame: memoryview, seed: int) -> torch.Tensor:
        """Return the chunk's values, flat, float32, in memory of their own.

        Raises WireError if no part of the chunk is compressed, or if the frame does not fit the chunk.
        """
        cut = self._compressed(chunk_id)
        began = time.perf_counter()
        try:
            return self._decode(cut, frame, seed)
        finally:
            self.decode_seconds += time.perf_counter() - began

    def _decode(self, cut: _Cut, frame: memoryview, seed: int) -> torch.Tensor:
        outside = cut.numel - cut.coded
        inside = self.codec.decode(frame[4 * outside :], cut.coded, seed)
        if not cut.gaps:
            return inside
        values = torch.empty(cut.numel)
        _scatter(from_frame(frame[: 4 * outside], "float32", outside, "the uncompressed part"), cut.gaps, values)
        _scatter(inside, cut.runs, values)
        return values


def _cut(numel: int, runs: list[Run]) -> _Cut:
    gaps, end = [], 0
    for start, length in [*runs, (numel, 0)]:
        if start > end:
            gaps.append((end, start - end))
        end = start + length
    return _Cut(numel, runs, gaps)


def _gather(values: torch.Tensor, runs: list[Run]) -> torch.Tensor:
    """Return the elements of all runs. A single run is not copied."""
    parts = [values[start : start + length] for start, length in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _scatter(elements: torch.Tensor, runs: list[Run], values: torch.Tensor) -> None:
    for (start, length), part in zip(runs, elements.split([length for _, length in runs]), strict=True):
        values[start : start + length] = part
