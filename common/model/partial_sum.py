"""Contributions to a chunk, and their addition. Workers and servers add in the same way."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from roundtable.common.model.layout import Chunk
from roundtable.common.protocol.model_spec import Kind


@dataclass
class Sum:
    """A contribution to one chunk, or a sum of several.

    `values` is flat, of the chunk's `sum_dtype`. Bit p of `present` says that piece p had a gradient. `owned` memory may be
    written to; other memory belongs to a received frame. The value is `values` x `scale`. `scale` is a power of two, so the
    multiplication can wait until `values` are read anyway, without a change of bits. Parameters without a gradient have no
    values: adding `nothing` changes nothing.

    Memory that `stays` does not change until the round is over, so it need not be read before, and additions can wait too. Such
    a sum has `halves`, left and right, and no values.
    """

    values: torch.Tensor
    present: int
    owned: bool = False
    scale: float = 1.0
    stays: bool = False
    halves: tuple[Sum, Sum] | None = None

    @property
    def is_nothing(self) -> bool:
        """Whether there are no values, because none of the parameters had a gradient."""
        return self.halves is None and not self.present and not len(self.values)

    def section(self, start: int, length: int) -> Sum:
        """Return elements start .. start+length-1, in the same memory."""
        if self.halves is not None:
            left, right = self.halves
            return put_off(left.section(start, length), right.section(start, length))
        return Sum(self.values[start : start + length], self.present, self.owned, self.scale, self.stays)


def nothing() -> Sum:
    """Return the contribution to parameters without a gradient."""
    return Sum(torch.empty(0), 0)


def put_off(left: Sum, right: Sum) -> Sum:
    """Return the sum of two contributions, which is added up later."""
    if left.is_nothing or right.is_nothing:
        return right if left.is_nothing else left
    return Sum(torch.empty(0), left.present | right.present, stays=left.stays and right.stays, halves=(left, right))


def is_mean(kind: Kind) -> bool:
    """Return whether contributions to chunks of this kind become a mean, in which each has a weight."""
    return kind in ("param", "mean")


def is_put_off(weight: float) -> bool:
    """Return whether multiplying by this weight can be put off without changing a bit: it is a power of two from 1 on."""
    return weight >= 1 and math.frexp(weight)[0] == 0.5


def weighted(values: torch.Tensor, present: int, weight: float, kind: Kind) -> Sum:
    """Return the contribution of a micro-batch: its gradients `values`, which may be overwritten, times its weight.

    With weight 0 a micro-batch contributes nothing to a mean, even if `values` are not finite.
    """
    if not is_mean(kind):
        return Sum(values, present, owned=True)
    if not weight:
        return nothing() if kind == "param" else Sum(values.zero_(), 0, owned=True)
    if is_put_off(weight):
        return Sum(values, present, owned=True, scale=float(weight))
    return Sum(values.mul_(weight), present, owned=True)


def is_change(chunk: Chunk, at_once: bool) -> bool:
    """Return whether contributions to a chunk of buffers are changes.

    Sums always are. If servers apply each contribution `at_once`, means and counters are too, so that each micro-batch counts
    even if several started from the same values.
    """
    return chunk.kind == "sum" or (at_once and (chunk.kind == "mean" or (chunk.kind == "max" and "int" in chunk.dtype)))


def move(chunk: Chunk, buffer: torch.Tensor, value: torch.Tensor) -> None:
    """Apply one contribution at once to the buffers of a chunk, or to some elements. For parameters it is their change."""
    if chunk.kind == "param" or is_change(chunk, at_once=True):
        buffer.add_(value)
    elif chunk.kind == "max":
        torch.maximum(buffer, value, out=buffer)
    else:
        buffer.copy_(value)


def adder(chunk: Chunk) -> Callable[[Sum, Sum], Sum]:
    """Return the function (left, right) -> sum for contributions to `chunk`.

    It reuses owned memory, the left one's first, and does not read memory that stays.
    """
    if chunk.kind == "last":
        return functools.partial(_later, chunk)
    kind = chunk.kind

    def add(left: Sum, right: Sum) -> Sum:
        if left.is_nothing or right.is_nothing or (left.stays and right.stays):
            return put_off(left, right)
        left, right = _added_up(kind, left), _added_up(kind, right)
        out = left.values if left.owned else right.values if right.owned else torch.empty_like(left.values)
        scale = add_values(kind, left, right, out)
        return Sum(out, left.present | right.present, owned=True, scale=scale)

    return add


def _later(chunk: Chunk, left: Sum, right: Sum) -> Sum:
    """Return, for each piece, the right value if there is one, and otherwise the left value."""
    first, second, taken = (left, right, right.present) if left.owned or not right.owned else (right, left, ~right.present)
    values = first.values if first.owned else first.values.clone()
    for bit, piece in enumerate(chunk.pieces):
        if taken >> bit & 1:
            values[piece.offset : piece.offset + piece.length] = second.values[piece.offset : piece.offset + piece.length]
    return Sum(values, left.present | right.present, owned=True)


def last_of(parts: Sequence[Sum], bit: int) -> Sum:
    """Return the last of several contributions in order that has piece number `bit`, or the last one if none has."""
    return next((part for part in reversed(parts) if part.present >> bit & 1), parts[-1])


def add_up(kind: Kind, total: Sum, out: Callable[[int], torch.Tensor], depth: int = 0) -> Sum:
    """Return `total` added up, in its own memory or in `out(0)`. `out(1)` and so on hold intermediate sums."""
    if total.halves is None:
        return total
    left, right = add_up(kind, total.halves[0], out, depth), add_up(kind, total.halves[1], out, depth + 1)
    scale = add_values(kind, left, right, out(depth))
    return Sum(out(depth), total.present, owned=True, scale=scale)


def _added_up(kind: Kind, total: Sum) -> Sum:
    """Return `total` added up. If additions had to wait, the result is in memory of its own."""
    first = total
    while first.halves is not None:
        first = first.halves[0]
    made: dict[int, torch.Tensor] = {}
    return add_up(kind, total, lambda depth: made.setdefault(depth, torch.empty_like(first.values)))


def add_values(kind: Kind, left: Sum, right: Sum, out: torch.Tensor) -> float:
    """Write the sum of two contributions to `out`, which may be the memory of one of them. Return the sum's scale."""
    if kind == "max":
        torch.maximum(left.values, right.values, out=out)
        return 1.0
    if left.scale == right.scale:
        torch.add(left.values, right.values, out=out)
        return left.scale
    a, b = left.values * left.scale, right.values * right.scale
    torch.add(a, b, out=out)
    return 1.0
