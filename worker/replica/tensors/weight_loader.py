"""Putting new weights into the model, copied or as they lie in a server's memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from roundtable.common.model.layout import Chunk
from roundtable.common.model.tensor_bytes import ALIGNED, from_frame
from roundtable.worker.replica.mapped_weights import InWeightBuffer, MappedWeights, shaped
from roundtable.worker.replica.tensors.buffer_state import BufferState
from roundtable.worker.replica.tensors.model_tensors import ModelTensors


class WeightLoader:
    """Puts weights and buffers into the model, chunk by chunk."""

    def __init__(self, tensors: ModelTensors, buffers: BufferState) -> None:
        self._tensors, self._buffers = tensors, buffers
        #: The memory of servers on this host, in which parameters then lie.
        self.mapped = MappedWeights(tensors.layout)
        #: Numbers of parameters that lie in servers' memory.
        self._in_memory: set[int] = set()

    @torch.no_grad()
    def load(self, weights: Mapping[int, Any], copy: bool) -> None:
        """Put new weights and buffers into the model; see `Replica.load`."""
        with torch._C.DisableTorchFunctionSubclass():  # lazy parameters must not wait for themselves
            self._tensors.check_dtypes()
            self._load(weights, copy)

    def _load(self, weights: Mapping[int, Any], copy: bool) -> None:
        packed, chunks_of = self._tensors.packed, self._tensors.chunks_of
        chunks = [self._tensors.layout.chunks[chunk] for chunk in sorted(weights)]
        values = {chunk.id: self._values(chunk, weights[chunk.id]) for chunk in chunks}
        for chunk in chunks:
            if chunk.id in packed:
                self._load_packed(chunk, weights[chunk.id], values[chunk.id], copy)
        cut = [chunk for chunk in chunks if chunk.id not in packed]
        tensors = {piece.tensor: [weights.get(c.id) for c in chunks_of[piece.tensor]] for c in cut for piece in c.pieces}
        adopted = {index for index, found in tensors.items() if not copy and self._adopt(index, chunks_of[index], found)}
        self._buffers.put_back(piece.tensor for chunk in cut for piece in chunk.pieces)
        # only now: a script's writes to an adopted tensor may have hidden newer values on the same page until here
        for chunk in cut:
            for piece in chunk.pieces:
                if piece.tensor not in adopted:
                    self._tensors.write(piece, values[chunk.id])
        for chunk in chunks:
            if chunk.kind != "param":
                self._buffers.begin(chunk, values[chunk.id])

    def _load_packed(self, chunk: Chunk, found: Any, values: torch.Tensor, copy: bool) -> None:
        """Load a chunk of whole parameters, in few calls."""
        tensors = self._tensors.packed[chunk.id]
        adopts = isinstance(found, InWeightBuffer) and not copy
        if adopts:
            self.mapped.forget_writes(values)
        views = self.mapped.shaped(chunk, found, tensors) if isinstance(found, InWeightBuffer) else shaped(values, tensors)
        targets, sources = [], []
        for piece, tensor, view in zip(chunk.pieces, tensors, views, strict=True):
            if adopts and view.data_ptr() % ALIGNED == 0 and tensor.device.type == "cpu" and tensor.is_contiguous():
                tensor.data = view
                self._in_memory.add(piece.tensor)
                continue
            if not copy and piece.tensor in self._in_memory:
                self._move_out(piece.tensor)
            targets.append(tensor.data)  # an autograd graph that has saved the tensor must see the new values
            sources.append(view)
        if targets:
            torch._foreach_copy_(targets, sources)

    @torch.no_grad()
    def move_all_out(self) -> None:
        """Give all parameters that lie in servers' memory a memory of their own, with their values."""
        for index in sorted(self._in_memory):
            values = self._tensors.tensors[index].data
            self._move_out(index)
            self._tensors.tensors[index].data.copy_(values)

    def _move_out(self, index: int) -> None:
        """Give a parameter that lies in a server's memory a memory of its own again."""
        tensor = self._tensors.tensors[index]
        tensor.data = torch.empty_like(tensor)
        self._in_memory.remove(index)

    def _values(self, chunk: Chunk, found: Any) -> torch.Tensor:
        if isinstance(found, InWeightBuffer):
            return self.mapped.chunk(chunk, found)
        return from_frame(found, chunk.dtype, chunk.numel, f"chunk {chunk.id}")

    def _adopt(self, index: int, chunks: list[Chunk], found: list[Any]) -> bool:
        """Make a parameter use the memory of its weights. Return False if they must be copied."""
        tensor = self._tensors.tensors[index]
        if chunks[0].kind != "param" or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return False
        places = [place for place in found if isinstance(place, InWeightBuffer)]
        flat = self.mapped.tensor(index, chunks, places) if len(places) == len(found) else None
        if flat is None or flat.data_ptr() % ALIGNED:
            if index in self._in_memory:
                self._move_out(index)
            return False
        self.mapped.forget_writes(flat)
        tensor.data = flat.view(tensor.dtype).view(tensor.shape)
        self._in_memory.add(index)
        return True
