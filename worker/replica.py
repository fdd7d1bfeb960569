"""A model's tensors as chunks: gradients out of it, new weights into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from common.errors import UsageError
from common.layout import Chunk, Layout, Piece, TensorSpec, make_layout
from common.sums import Sum
from common.tensors import dtype_name, dtype_of, from_frame, to_frame


class Replica:
    """One worker's copy of the model. Buffers are as much part of it as parameters: both have a version."""

    def __init__(self, model: nn.Module, groups: Mapping[int, int], servers: int) -> None:
        """`groups` maps id(parameter) to its parameter group; parameters not in it are not trained.

        Raises UsageError where a trained parameter has a dtype that servers cannot keep.
        """
        self.model = model
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if is_lazy(tensor):
                raise UsageError(f"'{name}' has no shape yet: pass one batch through the model before run.optimizer().")
        named = [(name, p, groups[id(p)]) for name, p in model.named_parameters() if id(p) in groups]
        strangers = len(groups) - len(named)
        if strangers:
            raise UsageError(f"{strangers} of the optimizer's parameters are not in the model that was replicated.")
        buffers = [(name, b, -1) for name, b in model.named_buffers() if b.numel()]
        self.tensors: list[torch.Tensor] = [tensor for _, tensor, _ in [*named, *buffers]]
        places: dict[int, str] = {}
        for name, tensor, _ in [*named, *buffers]:
            if tensor.numel() and (other := places.setdefault(tensor.data_ptr(), name)) != name:
                raise UsageError(f"'{name}' and '{other}' are two tensors in the same memory: assign one to both names, or copy.")
        self.specs = [TensorSpec(name, list(t.shape), dtype_name(t.dtype), group) for name, t, group in [*named, *buffers]]
        self.layout: Layout = make_layout(self.specs, servers)
        self._buffer_chunks = [chunk for chunk in self.layout.chunks if chunk.kind != "param"]
        #: Buffers as they were when the round began: every micro-batch starts from these.
        self._buffers: dict[int, torch.Tensor] = {}

    # ---- out of the model

    def gradient(self, samples: int) -> dict[int, Sum]:
        """The contribution of one micro-batch by chunk: gradient x samples, buffers x samples. Takes the gradients away."""
        out = {chunk.id: self._gather(chunk, samples) for chunk in self.layout.chunks}
        for tensor in self.tensors:
            tensor.grad = None
        return out

    def _gather(self, chunk: Chunk, samples: int) -> Sum:
        values = torch.empty(chunk.numel, dtype=dtype_of(chunk.sum_dtype))
        present = 0
        for bit, piece in enumerate(chunk.pieces):
            tensor = self.tensors[piece.tensor]
            source = tensor.grad if chunk.kind == "param" else tensor
            out = values[piece.offset : piece.offset + piece.length]
            if source is None:
                out.zero_()
                continue
            if source.is_sparse:
                source = source.to_dense()
            out.copy_(source.detach().reshape(-1)[piece.start : piece.start + piece.length])
            present |= (chunk.kind == "param" or self._changed(chunk, piece, out)) << bit
            if chunk.kind != "max":
                out.mul_(samples)
        return Sum(values, present, owned=True)

    def _changed(self, chunk: Chunk, piece: Piece, now: torch.Tensor) -> bool:
        """Whether a buffer is not what it was when the round began. Else servers keep it: a mean would differ by rounding."""
        then = self._buffers[chunk.id][piece.offset : piece.offset + piece.length]
        return not torch.equal(now.to(then.dtype), then)

    def present(self, values: Mapping[int, torch.Tensor]) -> dict[int, int]:
        """The mask of pieces to take over from `values`, which hold all tensors: parameters and changed buffers."""
        return {
            chunk.id: sum(
                (chunk.kind == "param" or self._changed(chunk, p, values[chunk.id][p.offset : p.offset + p.length])) << bit
                for bit, p in enumerate(chunk.pieces)
            )
            for chunk in self.layout.chunks
        }

    def weights(self) -> dict[int, torch.Tensor]:
        """A copy of all tensors by chunk, flat, in the dtype that servers keep."""
        return {chunk.id: self._flat(chunk, dtype_of(chunk.sum_dtype)) for chunk in self.layout.chunks}

    def first_weights(self) -> dict[int, memoryview]:
        """All tensors by chunk, as frames in their own dtype."""
        return {chunk.id: to_frame(self._flat(chunk, dtype_of(chunk.dtype))) for chunk in self.layout.chunks}

    def _flat(self, chunk: Chunk, dtype: torch.dtype) -> torch.Tensor:
        values = torch.empty(chunk.numel, dtype=dtype)
        for piece in chunk.pieces:
            source = self.tensors[piece.tensor].detach().reshape(-1)[piece.start : piece.start + piece.length]
            values[piece.offset : piece.offset + piece.length].copy_(source)
        return values

    # ---- into the model

    @torch.no_grad()
    def load(self, frames: Mapping[int, Any]) -> None:
        """Take over new weights and buffers, a frame for each chunk. Raises WireError for a frame of the wrong size."""
        values = {c.id: from_frame(frames[c.id], c.dtype, c.numel, f"chunk {c.id}") for c in self.layout.chunks}
        for chunk in self.layout.chunks:
            for piece in chunk.pieces:
                self._write(piece, values[chunk.id])
        self._buffers = {chunk.id: values[chunk.id].clone() for chunk in self._buffer_chunks}

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Put the buffers back to what they were when the round began."""
        for chunk in self._buffer_chunks:
            for piece in chunk.pieces:
                self._write(piece, self._buffers[chunk.id])

    def _write(self, piece: Piece, values: torch.Tensor) -> None:
        tensor = self.tensors[piece.tensor].detach()
        part = values[piece.offset : piece.offset + piece.length]
        if piece.length == tensor.numel():
            tensor.copy_(part.view(tensor.shape))
        elif tensor.is_contiguous():
            tensor.view(-1)[piece.start : piece.start + piece.length].copy_(part)
        else:
            whole = tensor.contiguous()
            whole.view(-1)[piece.start : piece.start + piece.length].copy_(part)
            tensor.copy_(whole)
