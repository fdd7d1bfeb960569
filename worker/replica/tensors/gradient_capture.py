"""Hooks that leave gradients in the gradient buffer as backward makes them."""

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

#: Gradients of fewer bytes are taken over together when all are made, for a call each takes longer than the copy.
_SMALL_BYTES = 64 << 10


class GradientCapture:
    """Says where each gradient is to lie, and moves there what backward has left elsewhere."""

    def __init__(self, tensors: ModelTensors) -> None:
        self._tensors = tensors
        #: By number, trainable parameters without a hook for their gradient: torch takes none before they require one.
        self._uncaught = {i for i, spec in enumerate(tensors.specs) if spec.group >= 0 and spec.numel}
        #: Numbers of parameters whose gradients are not caught.
        self._not_caught: list[int] = []
        #: The gradient buffer that backward makes gradients in; None if they are not to be contributed.
        self._gradient_buffer: GradientBuffer | None = None
        #: By gradient buffer and id of a parameter, the place of its gradient.
        self._places: dict[GradientBuffer, dict[int, torch.Tensor]] = {}
        #: Ids of parameters whose place has been given away already.
        self._given: set[int] = set()
        #: Whether gradients are added to what is in the gradient buffer.
        self._adds = False
        self._on_gradient: Callable[[int], None] | None = None
        self._made = threading.Lock()

    def __deepcopy__(self, memo: object) -> GradientCapture:
        """Return this one. A copy of the model has copies of its hooks. They lead here and do nothing for other parameters."""
        return self

    # ---- hooks

    def install(self, model: nn.Module) -> None:
        """From now on have backward leave each large gradient in the gradient buffer given to `contribute_to`."""
        self._catch_all()
        inplace_wgrad.install(model, self)

    def _catch_all(self) -> None:
        """Catch the gradients of those that have become able to have one: small ones only where each is pushed as it comes."""
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
        """Called with a tensor's number when backward has made its gradient: of one at a time, though backward has a thread for
        each GPU."""
        return self._on_gradient

    @on_gradient.setter
    def on_gradient(self, called: Callable[[int], None] | None) -> None:
        self._on_gradient = called
        if called is not None:
            self._catch_these(self._not_caught)
            self._not_caught = []

    @torch.no_grad()
    def catch(self, index: int, parameter: torch.Tensor) -> None:
        """Take the gradient of a parameter, which has been accumulated. Autograd calls this."""
        gradient = parameter.grad
        if self._gradient_buffer is None or self._adds or gradient is None or gradient.requires_grad or gradient.is_sparse:
            return
        if parameter is not self._tensors.tensors[index]:
            return  # of a copy of the model
        place = self._places[self._gradient_buffer].get(id(parameter))
        if place is not None and gradient.dtype == place.dtype and gradient.data_ptr() != place.data_ptr():
            parameter.grad = place.copy_(gradient)
        if self._on_gradient is not None:
            with self._made:
                self._on_gradient(index)

    # ---- where gradients go

    @property
    def gradient_buffer(self) -> GradientBuffer:
        """The gradient buffer that gradients go to now. There is one between `contribute_to` and `discard`."""
        assert self._gradient_buffer is not None
        return self._gradient_buffer

    def contribute_to(self, gradient_buffer: GradientBuffer) -> None:
        """Have the next gradients go to `gradient_buffer`."""
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
        """Have the next gradients added later to those of another micro-batch, which are in `gradient_buffer`."""
        self._gradient_buffer, self._adds = gradient_buffer, True

    def discard(self) -> None:
        """Take away the model's gradients and contribute nothing."""
        self._gradient_buffer = None
        for tensor in self._tensors.tensors:
            tensor.grad = None

    def places(self, gradient_buffer: GradientBuffer) -> Mapping[int, torch.Tensor]:
        """Return the places of gradients in a gradient buffer that was given to `contribute_to`, by id of their parameter."""
        return self._places[gradient_buffer]

    def _place(
        self, gradient_buffer: GradientBuffer, offsets: Mapping[int, int], tensor: torch.Tensor, chunks: list[Chunk]
    ) -> torch.Tensor:
        first = next(piece for piece in chunks[0].pieces if self._tensors.tensors[piece.tensor] is tensor)
        start = offsets[chunks[0].id] + first.offset * tensor.element_size()
        place = (
            gradient_buffer.memory[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        )
        return place.data  # with a count of its own of how often it is written to

    def place(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Return where to compute the gradient of `weight`; None if that is not for this backward to decide."""
        if self._gradient_buffer is None or self._adds or weight.grad is not None or id(weight) in self._given:
            return None
        place = self._places[self._gradient_buffer].get(id(weight))
        if place is None or place.dtype != weight.dtype:
            return None
        self._given.add(id(weight))
        return place.view(place.shape)  # a new tensor, for autograd keeps it only if nobody else does


def _is_plain(tensor: torch.Tensor, chunk: Chunk) -> bool:
    """Return whether its gradient and its elements in chunks are one and the same memory, on the CPU."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and chunk.dtype == chunk.sum_dtype
