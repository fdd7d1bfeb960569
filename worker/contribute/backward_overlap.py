"""Pushing a contribution while backward is still making the rest of it.

Horovod, DDP and others overlap communication with backward in this way. Hashemi et al., "TicTac" (MLSys 2019), Jayarajan et al.,
"Priority-based parameter propagation" (P3, MLSys 2019) and Peng et al., "ByteScheduler" (SOSP 2019) also send first what the
next forward needs first, with few bytes under way. After a gradient is sent, the script may yet change it
before `step`: it may clip it, or call backward again. So an early push does not count until `unchanged` has found that the
gradients are still those that were sent.
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
    """Contributions that the new one is added to, by chunk, and whether they are its left operand or its right one."""

    sums: dict[int, Sum]
    on_left: bool


class OverlappedPush:
    """One contribution of `samples` samples that backward is making in `gradient_buffer`."""

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
        """`joins`: the sums to add the contribution to, in order. `spare()` returns memory for the results.

        The results need memory of their own, because gradients must not change before `step`. `send` is called for a ready
        chunk if `sends` is true for it.
        """
        self._replica = replica
        self._gradient_buffer = gradient_buffer
        self._samples = samples
        self._joins = joins
        self._take_spare = spare
        self._spare: GradientBuffer | None = None
        self._send = send
        self._sends = sends
        #: By tensor: where its gradient lay when it was made, its write count and its checksum.
        self._made: dict[int, tuple[int, int, int]] = {}
        #: By chunk: the same for each of its pieces when it was sent.
        self._sent: dict[int, list[tuple[int, int, int]]] = {}
        #: Seconds that all of this has taken.
        self.seconds = 0.0
        #: By chunk: the values that were sent.
        self.values: dict[int, torch.Tensor] = {}

    @property
    def spare(self) -> GradientBuffer | None:
        """The memory that was used for sums, if any."""
        return self._spare

    def made(self, index: int) -> None:
        """Note that backward has made the gradient of tensor number `index`, and send the chunks that are complete now."""
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
        """Return the chunks that were sent and whose gradients are still the same."""
        began = time.monotonic()
        tensors = {piece.tensor for chunk in self._sent for piece in self._replica.layout.chunks[chunk].pieces}
        now = {index: self._look(index) for index in tensors}
        pieces = {chunk: self._replica.layout.chunks[chunk].pieces for chunk in self._sent}
        same = {chunk for chunk, then in self._sent.items() if then == [now[piece.tensor] for piece in pieces[chunk]]}
        self.seconds += time.monotonic() - began
        return same

    def _look(self, index: int) -> tuple[int, int, int]:
        """Return a gradient's address, torch's write count and a checksum.

        The checksum finds writes that torch does not count.
        """
        gradient = self._replica.tensors[index].grad
        if gradient is None or gradient.is_sparse:
            return 0, 0, 0
        bits = gradient.detach().reshape(-1).view(torch.uint8)
        words = bits[: len(bits) // 8 * 8].view(torch.int64)
        return gradient.data_ptr(), gradient._version, int(words.sum()) + int(bits[len(bits) // 8 * 8 :].sum())

    def _add_up(self, chunk: Chunk, value: Sum) -> Sum:
        """Return the value times its samples, added to earlier sums.

        The bits are those that `weighted` and the tree would give.
        """
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
