"""The memory that this worker's contributions lie in, from backward until nobody needs them any more."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from roundtable.common.model.gradient_buffer_layout import GRADIENT_BUFFERS, gradient_buffer_bytes, memory_of, views
from roundtable.common.model.layout import Layout
from roundtable.common.protocol.shared_memory import Handle, NotShared, Region, create

log = logging.getLogger("roundtable.worker.gradient_buffers")

#: How many gradient buffers this worker's part of a round may lie in, for servers to add up. They read each once, block by block,
#: while a sum made here is read, written and read again. The rest is added up here, as gradient buffers cost memory.
_APART = 4
#: Smaller contributions are added up here, for a message costs more.
_LARGE_BYTES = 8 << 20


@dataclass(eq=False)
class GradientBuffer:
    """Room for one contribution. `index` is its place in the shared region; -1: it is this process's own."""

    index: int
    #: Flat tensors of each chunk's `sum_dtype`.
    chunks: dict[int, torch.Tensor]
    #: All its bytes, for tensors that reach over several chunks.
    memory: torch.Tensor
    #: Whether a contribution is being made in it, or waits to be summed up.
    taken: bool = False
    #: The last round that it was pushed for.
    pushed: int = field(default=-1)


class GradientBuffers:
    """Gradient buffers as they are needed, in shared memory as long as there is room, reused when they are free."""

    def __init__(self, layout: Layout, shared: bool) -> None:
        self._layout = layout
        self._bytes = gradient_buffer_bytes(layout)
        self._gradient_buffers: list[GradientBuffer] = []
        self._region: Region | None = None
        if shared and layout.chunks:
            try:
                self._region = create(GRADIENT_BUFFERS * self._bytes)
            except NotShared as error:
                log.warning("%s Gradients are sent over TCP.", error)

    def may_lie_apart(self, round_: int) -> bool:
        """Whether one more contribution to a round may be left where it is, not added to others."""
        if self._region is None or self._bytes < _LARGE_BYTES:
            return False
        return sum(gradient_buffer.pushed == round_ for gradient_buffer in self._gradient_buffers) < _APART

    @property
    def handle(self) -> Handle | None:
        """What servers need to read the gradient buffers; None where they are not shared."""
        return self._region.handle if self._region is not None else None

    def take(self, in_use: Callable[[GradientBuffer], bool]) -> GradientBuffer:
        """A gradient buffer that is not taken and, as `in_use` tells, not read by anybody."""
        gradient_buffer = next(
            (
                gradient_buffer
                for gradient_buffer in self._gradient_buffers
                if not gradient_buffer.taken and not in_use(gradient_buffer)
            ),
            None,
        )
        if gradient_buffer is None:
            index = len(self._gradient_buffers)
            if self._region is None or index >= GRADIENT_BUFFERS:
                index, memory = -1, torch.empty(self._bytes, dtype=torch.uint8)
            else:
                memory = memory_of(self._layout, self._region, index)
            _pin(memory)
            gradient_buffer = GradientBuffer(index, views(self._layout, memory), memory)
            self._gradient_buffers.append(gradient_buffer)
        gradient_buffer.taken = True
        return gradient_buffer


def _pin(memory: torch.Tensor) -> None:
    """Have GPUs copy gradients to this memory directly. Untested so far, as CUDA is."""
    if torch.cuda.is_available() and memory.numel():
        torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
