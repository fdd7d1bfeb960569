"""Hooks that put gradients into the gradient buffer as backward makes them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from roundtable.common.model.layout import Chunk, gradient_offsets
from roundtable.common.model.tensor_bytes import ALIGNED
from roundtable.worker.replica import inplace_wgrad
from roundtable.worker.replica.gradient_buffers import GradientBuffer
from roundtable.worker.replica.tensors.model_tensors import ModelTensors

#: Gradients of fewer bytes are copied together after backward, because a call for each takes longer than its copy.
_SMALL_BYTES = 64 << 10


class GradientCapture:
    """Decides where each gradient lies, and moves those that backward has put elsewhere."""

    def __init__(self, tensors: ModelTensors) -> None:
        self._tensors = tensors
        #: Trainable parameters, by number, whose gradients have no hook yet. torch accepts none before they require a gradient.
        self._uncaught = {i for i, spec in enumerate(tensors.specs) if spec.group >= 0 and spec.numel}
        #: Numbers of parameters whose gradients have no hook, because they are small.
        self._not_caught: list[int] = []
        #: The gradient buffer in which backward makes gradients; None if they are not contributed.
        self._gradient_buffer: GradientBuffer | None = None
        #: By gradient buffer and id of a parameter: the place of its gradient.
        self._places: dict[GradientBuffer, dict[int, torch.Tensor]] = {}
        #: Ids of parameters whose places have been given out.
        self._given: set[int] = set()
        #: Whether gradients are added to those in the gradient buffer.
        self._adds = False
        self._on_gradient: Callable[[int], None] | None = None
        self._made = threading.Lock()

    def __deepcopy__(self, memo: object) -> GradientCapture:
        """Return this one. The hooks in a copy of the model call it, and it ignores the copy's parameters."""
        return self

    # ---- hooks

    def install(self, model: nn.Module) -> None:
        """Make backward put each large gradient into the gradient buffer given to `contribute_to`, from now on."""
        self._catch_all()
        inplace_wgrad.install(model, self)

    def _catch_all(self) -> None:
        """Add hooks to parameters that now require a gradient: to small ones only if each is pushed as it comes."""
        tensors = self._tensors.tensors
        for index in [index for index in self._uncaught if tensors[index].requires_grad]:
            self._uncaught.remove(index)
            if tensors[index].nbytes < _SMALL_BYTES and self._on_gradient is None:
                self._not_caught.append(index)
            else:
                self._catch_these([index])

    def _catch_these(self, indices: Iterable[int]) -> None:
        with torch._C.DisableTorchFunctionSubclass():  # a hook needs no weights, which may still be awaited
            for index in indices:
                self._tensors.tensors[index].register_post_accumulate_grad_hook(functools.partial(self.catch, index))

    @property
    def on_gradient(self) -> Callable[[int], None] | None:
        """A function that is called with a tensor's number when backward has made its gradient.

        Only one call runs at a time, although backward has a thread for each GPU.
        """
        return self._on_gradient

    @on_gradient.setter
    def on_gradient(self, called: Callable[[int], None] | None) -> None:
        self._on_gradient = called
        if called is not None:
            self._catch_these(self._not_caught)
            self._not_caught = []

    @torch.no_grad()
    def catch(self, index: int, parameter: torch.Tensor) -> None:
        """Move the accumulated gradient of a parameter to its place. Autograd calls this."""
        gradient = parameter.grad
        if self._gradient_buffer is None or self._adds or gradient is None or gradient.requires_grad or gradient.is_sparse:
            return
        if parameter is not self._tensors.tensors[index]:
            return  # this parameter belongs to a copy of the model
        place = self._places[self._gradient_buffer].get(id(parameter))
        if place is not None and gradient.dtype == place.dtype and gradient.data_ptr() != place.data_ptr():
            parameter.grad = place.copy_(gradient)
        if self._on_gradient is not None:
            with self._made:
                self._on_gradient(index)

    # ---- where gradients go

    @property
    def gradient_buffer(self) -> GradientBuffer:
        """The present gradient buffer. There is one between `contribute_to` and `discard`."""
        assert self._gradient_buffer is not None
        return self._gradient_buffer

    def contribute_to(self, gradient_buffer: GradientBuffer) -> None:
        """Send the next gradients to `gradient_buffer`."""
        self._catch_all()
        self._gradient_buffer, self._adds, self._given = gradient_buffer, False, set()
        if gradient_buffer not in self._places:
            offsets, _ = gradient_offsets(self._tensors.layout)
            specs, chunks_of = self._tensors.specs, self._tensors.chunks_of
            places = {
                id(tensor): self._place(gradient_buffer, offsets, tensor, chunks_of[index])
                for index, tensor in enumerate(self._tensors.tensors)
                if specs[index].group >= 0 and tensor.numel() and _is_plain(tensor, chunks_of[index][0])
            }
            self._places[gradient_buffer] = {key: place for key, place in places.items() if place.data_ptr() % ALIGNED == 0}

    def add_to(self, gradient_buffer: GradientBuffer) -> None:
        """Let the next gradients be added later to those of another micro-batch, which are in `gradient_buffer`."""
        self._gradient_buffer, self._adds = gradient_buffer, True

    def discard(self) -> None:
        """Remove the model's gradients without a contribution."""
        self._gradient_buffer = None
        for tensor in self._tensors.tensors:
            tensor.grad = None

    def places(self, gradient_buffer: GradientBuffer) -> Mapping[int, torch.Tensor]:
        """Return the places of gradients in a buffer that was given to `contribute_to`, by id of the parameter."""
        return self._places[gradient_buffer]

    def _place(
        self, gradient_buffer: GradientBuffer, offsets: Mapping[int, int], tensor: torch.Tensor, chunks: list[Chunk]
    ) -> torch.Tensor:
        first = next(piece for piece in chunks[0].pieces if self._tensors.tensors[piece.tensor] is tensor)
        start = offsets[chunks[0].id] + first.offset * tensor.element_size()
        place = (
            gradient_buffer.memory[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        )
        return place.data  # its count of writes is then its own

    def place(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Return where to compute the gradient of `weight`. Return None if this backward cannot decide that."""
        if self._gradient_buffer is None or self._adds or weight.grad is not None or id(weight) in self._given:
            return None
        place = self._places[self._gradient_buffer].get(id(weight))
        if place is None or place.dtype != weight.dtype:
            return None
        self._given.add(id(weight))
        return place.view(place.shape)  # a new tensor: autograd keeps it only if no other reference to it exists


def _is_plain(tensor: torch.Tensor, chunk: Chunk) -> bool:
    """Return whether a tensor's gradient and its elements in chunks can be the same memory, on the CPU."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and chunk.dtype == chunk.sum_dtype
