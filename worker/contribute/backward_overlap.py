"""Pushing a contribution while backward is still making the rest of it.

Horovod, DDP and others overlap communication with backward in this way; Hashemi et al., "TicTac" (MLSys 2019), Jayarajan et al.,
"Priority-based parameter propagation" (P3, MLSys 2019) and Peng et al., "ByteScheduler" (SOSP 2019) add that what the next
forward needs first goes first, with few bytes under way. What a script does with gradients between backward and `step` is not
known when they are sent: it may clip them, or call backward again. So what is sent early does not count until `unchanged` has
found that the gradients are still those that were sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from roundtable.common.model.layout import Chunk
from roundtable.common.model.partial_sum import Sum, add_values
from roundtable.worker.replica.gradient_buffers import GradientBuffer
from roundtable.worker.replica.replica import Replica


@dataclass(frozen=True)
class TreeJoin:
    """Contributions to all chunks, by chunk, that the new one is added to: on its left or on its right."""

    sums: dict[int, Sum]
    on_left: bool


class OverlappedPush:
    """One contribution in the making, of `samples` samples, in `gradient_buffer`."""

    def __init__(
        self,
        replica: Replica,
        gradient_buffer: GradientBuffer,
        samples: int,
        joins: Sequence[TreeJoin],
        spare: Callable[[], GradientBuffer],
        send: Callable[[int, Sum, GradientBuffer], None],
        sends: Callable[[int], bool],
    ) -> None:
        """`joins` are what it is added to, in order; `spare()` is memory for sums, as gradients must stay what they are until
        `step`. `send` takes a chunk that is ready, for which `sends` is true."""
        self._replica = replica
        self._gradient_buffer = gradient_buffer
        self._samples = samples
        self._joins = joins
        self._take_spare = spare
        self._spare: GradientBuffer | None = None
        self._send = send
        self._sends = sends
        #: What gradients looked like when they were made, by tensor; and, by chunk, when it was sent.
        self._made: dict[int, tuple[int, int, int]] = {}
        self._sent: dict[int, list[tuple[int, int, int]]] = {}
        #: How long all of this has taken.
        self.seconds = 0.0
        #: By chunk, what was sent.
        self.values: dict[int, torch.Tensor] = {}

    @property
    def spare(self) -> GradientBuffer | None:
        """Memory that was used for sums, if any."""
        return self._spare

    def made(self, index: int) -> None:
        """Backward has made the gradient of tensor number `index`."""
        chunks = [c for c in self._replica.chunks_of(index) if c.id not in self._sent and self._sends(c.id)]
        if not chunks:
            return
        began = time.monotonic()
        self._made[index] = self._look(index)
        for chunk in chunks:
            if all(piece.tensor in self._made for piece in chunk.pieces):
                self._sent[chunk.id] = [self._made[piece.tensor] for piece in chunk.pieces]
                value = self._add_up(
                    chunk, Sum(self._gradient_buffer.chunks[chunk.id], self._replica.collect(chunk, self._gradient_buffer))
                )
                self.values[chunk.id] = value.values
                self._send(
                    chunk.id,
                    value,
                    self._gradient_buffer if value.values is self._gradient_buffer.chunks[chunk.id] else self._memory,
                )
        self.seconds += time.monotonic() - began

    def unchanged(self) -> set[int]:
        """Chunks that were sent and whose gradients are still the same."""
        began = time.monotonic()
        tensors = {piece.tensor for chunk in self._sent for piece in self._replica.layout.chunks[chunk].pieces}
        now = {index: self._look(index) for index in tensors}
        pieces = {chunk: self._replica.layout.chunks[chunk].pieces for chunk in self._sent}
        same = {chunk for chunk, then in self._sent.items() if then == [now[piece.tensor] for piece in pieces[chunk]]}
        self.seconds += time.monotonic() - began
        return same

    def _look(self, index: int) -> tuple[int, int, int]:
        """Where a gradient is, how often torch has written to it, and a sum over its bits, for there are other ways to write."""
        gradient = self._replica.tensors[index].grad
        if gradient is None or gradient.is_sparse:
            return 0, 0, 0
        bits = gradient.detach().reshape(-1).view(torch.uint8)
        words = bits[: len(bits) // 8 * 8].view(torch.int64)
        return gradient.data_ptr(), gradient._version, int(words.sum()) + int(bits[len(bits) // 8 * 8 :].sum())

    def _add_up(self, chunk: Chunk, value: Sum) -> Sum:
        """x samples, and added to what was computed before: to the bit what `weighted` and the tree would give."""
        if self._samples & (self._samples - 1):
            value = Sum(torch.mul(value.values, self._samples, out=self._memory.chunks[chunk.id]), value.present)
        else:
            value.scale = float(self._samples)
        for join in self._joins:
            other = join.sums[chunk.id]
            if other.is_nothing:
                continue
            left, right = (other, value) if join.on_left else (value, other)
            out = self._memory.chunks[chunk.id]
            scale = add_values(chunk.kind, left, right, out)
            value = Sum(out, left.present | right.present, scale=scale)
        return value

    @property
    def _memory(self) -> GradientBuffer:
        if self._spare is None:
            self._spare = self._take_spare()
        return self._spare
