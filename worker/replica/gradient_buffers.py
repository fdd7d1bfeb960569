"""The memory of this worker's contributions, from backward until no server needs them any more."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from roundtable.common.model.gradient_buffer_layout import GRADIENT_BUFFERS, gradient_buffer_bytes, memory_of, views
from roundtable.common.model.layout import Layout
from roundtable.common.protocol.shared_memory import Handle, NotShared, Region, create

log = logging.getLogger("roundtable.worker.gradient_buffers")

#: In so many gradient buffers, a worker's part of a round may wait for servers to add it up. A server reads each of them once,
#: while a sum made here is read, written and read again. The rest is added up here, because gradient buffers cost memory.
_APART = 4
#: Smaller contributions are added up here, because a message costs more than that.
_LARGE_BYTES = 8 << 20


@dataclass(eq=False)
class GradientBuffer:
    """Memory for one contribution. `index` is its place in the shared region, or -1 if the memory is this process's own."""

    index: int
    #: By chunk: a flat tensor of the chunk's `sum_dtype`.
    chunks: dict[int, torch.Tensor]
    #: All bytes, for tensors that span several chunks.
    memory: torch.Tensor
    #: Whether a contribution is being made here, or waits to be added up.
    taken: bool = False
    #: The last round for which the buffer was pushed, or -1.
    pushed: int = field(default=-1)


class GradientBuffers:
    """Makes gradient buffers as they are needed, in shared memory while there is room, and reuses free ones."""

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
        """Return whether one more contribution to a round may stay in its own buffer, rather than be added to others."""
        if self._region is None or self._bytes < _LARGE_BYTES:
            return False
        return sum(gradient_buffer.pushed == round_ for gradient_buffer in self._gradient_buffers) < _APART

    @property
    def handle(self) -> Handle | None:
        """The handle by which servers read the gradient buffers; None if they are not shared."""
        return self._region.handle if self._region is not None else None

    def take(self, in_use: Callable[[GradientBuffer], bool]) -> GradientBuffer:
        """Return a gradient buffer that is not taken and that, by `in_use`, no server reads."""
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
    """Let GPUs copy gradients to this memory directly. Untested so far, like all of CUDA."""
    if torch.cuda.is_available() and memory.numel():
        torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
