"""Buffers as they were when the round began, and how they differ from that now."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from roundtable.common.model.layout import Chunk, Piece
from roundtable.worker.replica.buffers import as_bytes, parts_of, same_bytes
from roundtable.worker.replica.tensors.model_tensors import ModelTensors


class BufferState:
    """Keeps the buffers that every micro-batch of a round starts from."""

    def __init__(self, tensors: ModelTensors) -> None:
        self._tensors = tensors
        self._chunks = [chunk for chunk in tensors.layout.chunks if chunk.kind != "param"]
        #: By chunk, the buffers as they were when the round began.
        self._began: dict[int, torch.Tensor] = {}

    def begin(self, chunk: Chunk, values: torch.Tensor) -> None:
        """Have the buffers of a chunk start from `values`."""
        self._began[chunk.id] = values.clone()

    def began(self) -> dict[int, torch.Tensor]:
        """Return buffers as they were when the round began, by chunk."""
        return dict(self._began)

    def of(self, chunk: Chunk) -> torch.Tensor:
        """Return the buffers of a chunk as they were when the round began."""
        return self._began[chunk.id]

    def _began_with(self, chunk: Chunk, piece: Piece) -> torch.Tensor:
        return self._began[chunk.id][piece.offset : piece.offset + piece.length]

    def changed(self, chunk: Chunk, piece: Piece, now: torch.Tensor) -> bool:
        """Return whether a buffer is not what it was when the round began.

        Servers keep an unchanged one, as a mean would differ by rounding.
        A buffer that travels as bytes has changed as a whole or not at all, lest it become a mixture.
        """
        if chunk.kind == "last":
            return self._changed_anywhere(piece.tensor)
        then = self._began_with(chunk, piece)
        return not torch.equal(now.to(then.dtype), then)

    def _changed_anywhere(self, index: int) -> bool:
        """Return whether the buffer that tensor number `index` is a part of is not what it was."""
        buffer, part = self._tensors.buffer_of[index]
        for number, (_, now) in enumerate(parts_of(buffer.now()), index - part):
            elements = as_bytes(now)
            for chunk in self._tensors.chunks_of.get(number, ()):
                for piece in chunk.pieces:
                    here = elements[piece.start : piece.start + piece.length]
                    if piece.tensor == number and not same_bytes(here, self._began_with(chunk, piece)):
                        return True
        return False

    @torch.no_grad()
    def reset(self) -> None:
        """Put the buffers back to what they were when the round began."""
        self.put_back(self._tensors.buffer_of)
        for chunk in self._chunks:
            for piece in chunk.pieces:
                self._tensors.write(piece, self._began[chunk.id])

    def put_back(self, indices: Iterable[int]) -> None:
        """Have the model use the tensors that are written to, for a script may have put others in the place of buffers."""
        buffer_of = self._tensors.buffer_of
        moved = [b for b, part in (buffer_of[index] for index in indices if index in buffer_of) if not part and b.put_back()]
        for index, (buffer, part) in buffer_of.items() if moved else ():
            self._tensors.tensors[index] = buffer.parts()[part][1]
