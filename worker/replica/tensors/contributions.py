"""The contribution of a micro-batch as sums by chunk, made from the model's gradients and buffers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from roundtable.common.model.layout import Chunk
from roundtable.common.model.partial_sum import Sum, adder, is_change, nothing, weighted
from roundtable.worker.replica.gradient_buffers import GradientBuffer
from roundtable.worker.replica.mapped_weights import shaped
from roundtable.worker.replica.tensors.buffer_state import BufferState
from roundtable.worker.replica.tensors.gradient_capture import GradientCapture
from roundtable.worker.replica.tensors.model_tensors import ModelTensors


class Contributions:
    """Makes contributions in the gradient buffer where the gradients are."""

    def __init__(self, tensors: ModelTensors, buffers: BufferState, capture: GradientCapture, at_once: bool) -> None:
        """`at_once`: servers apply each contribution by itself."""
        self._tensors, self._buffers, self._capture = tensors, buffers, capture
        #: Chunks whose contributions are changes of buffers.
        self._changes = {chunk.id for chunk in tensors.layout.chunks if is_change(chunk, at_once)}
        #: By packed chunk and gradient buffer: the place of each tensor's gradient.
        self._parts: dict[tuple[int, GradientBuffer], Sequence[torch.Tensor]] = {}

    @torch.no_grad()
    def gradient(self, weight: float, without: Collection[int]) -> dict[int, Sum]:
        """Make the contribution of one micro-batch; see `Replica.gradient`."""
        gradient_buffer, out = self._capture.gradient_buffer, {}
        for chunk in self._tensors.layout.chunks:
            if chunk.id not in without:
                is_nothing, values = self._has_none(chunk), gradient_buffer.chunks[chunk.id]
                out[chunk.id] = (
                    nothing() if is_nothing else weighted(values, self.collect(chunk, gradient_buffer), weight, chunk.kind)
                )
        self._capture.discard()
        return out

    @torch.no_grad()
    def added(self, samples: int, sums: Mapping[int, Sum]) -> dict[int, Sum]:
        """Add the contribution of one micro-batch to another; see `Replica.added`."""
        gradient_buffer, out = self._capture.gradient_buffer, {}
        for chunk in self._tensors.layout.chunks:
            total = sums[chunk.id]
            if total.is_nothing:
                out[chunk.id] = self._own(chunk, gradient_buffer.chunks[chunk.id], samples)
            elif chunk.kind == "param":
                present = self._add_pieces(chunk, total.values)
                out[chunk.id] = Sum(total.values, total.present | present, owned=True, scale=total.scale)
            else:
                values = torch.empty_like(total.values)
                out[chunk.id] = adder(chunk)(total, self._own(chunk, values, samples))
        self._capture.discard()
        return out

    def _has_none(self, chunk: Chunk) -> bool:
        """Return whether no parameter in a chunk has a gradient."""
        return chunk.kind == "param" and all(self._tensors.tensors[piece.tensor].grad is None for piece in chunk.pieces)

    def _own(self, chunk: Chunk, values: torch.Tensor, samples: int) -> Sum:
        """Return the model's contribution to a chunk, times its samples, in `values`."""
        if self._has_none(chunk):
            return nothing()
        return weighted(values, self._collect(chunk, values, {}), samples, chunk.kind)

    def _add_pieces(self, chunk: Chunk, total: torch.Tensor) -> int:
        """Add a chunk's gradients to `total`, and return the mask of the pieces that have one."""
        present, parts, gradients = 0, [], []
        for bit, piece in enumerate(chunk.pieces):
            part = total[piece.offset : piece.offset + piece.length]
            gradient = self._tensors.tensors[piece.tensor].grad
            if gradient is None:
                part.add_(0.0)  # the contribution is 0 here
                continue
            gradient = gradient.to_dense() if gradient.is_sparse else gradient.detach()
            parts.append(part)
            gradients.append(gradient.reshape(-1)[piece.start : piece.start + piece.length].to(part.device, part.dtype))
            present |= 1 << bit
        if parts:
            torch._foreach_add_(parts, gradients)
        return present

    @torch.no_grad()
    def collect(self, chunk: Chunk, gradient_buffer: GradientBuffer) -> int:
        """Put the model's contribution to a chunk into the gradient buffer, and return the mask of its pieces."""
        if chunk.id in self._tensors.packed:
            return self._collect_packed(chunk, gradient_buffer)
        return self._collect(chunk, gradient_buffer.chunks[chunk.id], self._capture.places(gradient_buffer))

    def _collect_packed(self, chunk: Chunk, gradient_buffer: GradientBuffer) -> int:
        """Collect a chunk of whole parameters, in few calls."""
        tensors, key = self._tensors.packed[chunk.id], (chunk.id, gradient_buffer)
        if key not in self._parts:
            self._parts[key] = shaped(gradient_buffer.chunks[chunk.id], tensors)
        present, parts, gradients = 0, [], []
        for bit, (tensor, part) in enumerate(zip(tensors, self._parts[key], strict=True)):
            gradient = tensor.grad
            if gradient is None:
                part.zero_()
                continue
            present |= 1 << bit
            if gradient.is_sparse:
                gradient = gradient.to_dense()
            if gradient.data_ptr() != part.data_ptr():
                parts.append(part)
                gradients.append(gradient)
        if parts:
            torch._foreach_copy_(parts, gradients)
        return present

    def _collect(self, chunk: Chunk, values: torch.Tensor, places: Mapping[int, torch.Tensor]) -> int:
        present = 0
        for bit, piece in enumerate(chunk.pieces):
            part = values[piece.offset : piece.offset + piece.length]
            if chunk.kind != "param":
                part.copy_(self._tensors.elements(piece.tensor)[piece.start : piece.start + piece.length])
                present |= self._buffers.changed(chunk, piece, part) << bit
                continue
            tensor = self._tensors.tensors[piece.tensor]
            source = tensor.grad
            if source is None:
                part.zero_()
                continue
            if source.is_sparse:
                source = source.to_dense()
            place = places.get(id(tensor))
            if place is None or source.data_ptr() != place.data_ptr():
                part.copy_(source.detach().reshape(-1)[piece.start : piece.start + piece.length])
            present |= 1 << bit
        if chunk.id in self._changes:
            values[: chunk.numel].sub_(self._buffers.of(chunk).to(values.dtype))
        return present
