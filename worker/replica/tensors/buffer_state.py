"""The buffers at the start of the round, and how they have changed since."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from roundtable.common.model.layout import Chunk, Piece
from roundtable.worker.replica.buffers import as_bytes, parts_of, same_bytes
from roundtable.worker.replica.tensors.model_tensors import ModelTensors


class BufferState:
    """Keeps the buffers from which every micro-batch of a round starts."""

    def __init__(self, tensors: ModelTensors) -> None:
        self._tensors = tensors
        self._chunks = [chunk for chunk in tensors.layout.chunks if chunk.kind != "param"]
        #: By chunk: the buffers at the start of the round.
        self._began: dict[int, torch.Tensor] = {}

    def begin(self, chunk: Chunk, values: torch.Tensor) -> None:
        """Make the buffers of a chunk start from `values`."""
        self._began[chunk.id] = values.clone()

    def began(self) -> dict[int, torch.Tensor]:
        """Return the buffers at the start of the round, by chunk."""
        return dict(self._began)

    def of(self, chunk: Chunk) -> torch.Tensor:
        """Return the buffers of a chunk at the start of the round."""
        return self._began[chunk.id]

    def _began_with(self, chunk: Chunk, piece: Piece) -> torch.Tensor:
        return self._began[chunk.id][piece.offset : piece.offset + piece.length]

    def changed(self, chunk: Chunk, piece: Piece, now: torch.Tensor) -> bool:
        """Return whether a buffer has changed since the start of the round.

        Servers keep an unchanged buffer as it is, because a mean would change it by rounding. A buffer that travels as bytes
        changes as a whole or not at all, so that its pieces never come from different micro-batches.
        """
        if chunk.kind == "last":
            return self._changed_anywhere(piece.tensor)
        then = self._began_with(chunk, piece)
        return not torch.equal(now.to(then.dtype), then)

    def _changed_anywhere(self, index: int) -> bool:
        """Return whether the buffer that tensor number `index` is a part of has changed."""
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
        """Reset the buffers to their values at the start of the round."""
        self.put_back(self._tensors.buffer_of)
        for chunk in self._chunks:
            for piece in chunk.pieces:
                self._tensors.write(piece, self._began[chunk.id])

    def put_back(self, indices: Iterable[int]) -> None:
        """Make the model use the replica's own buffers again, because a script may have replaced them."""
        buffer_of = self._tensors.buffer_of
        moved = [b for b, part in (buffer_of[index] for index in indices if index in buffer_of) if not part and b.put_back()]
        for index, (buffer, part) in buffer_of.items() if moved else ():
            self._tensors.tensors[index] = buffer.parts()[part][1]
