"""Contributions to a chunk and how two of them are added: the same on workers and servers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from roundtable.common.model.layout import Chunk
from roundtable.common.protocol.model_spec import Kind


@dataclass
class Sum:
    """A contribution to one chunk, or a sum of several.

    `values` is flat, of the chunk's `sum_dtype`; bit p of `present` says that piece p had a gradient. `owned` memory may be
    written to; other memory belongs to a received frame. What is meant is `values` x `scale`, a power of two: multiplying by
    it changes no bit of what comes later, so it is put off until values are touched anyway. Of parameters without a gradient
    there are no values: to add `nothing` changes nothing.

    Memory that `stays` as it is until the round is over need not be read before, so adding is put off too: such a sum has
    `halves`, left and right, and no values.
    """

    values: torch.Tensor
    present: int
    owned: bool = False
    scale: float = 1.0
    stays: bool = False
    halves: tuple[Sum, Sum] | None = None

    @property
    def is_nothing(self) -> bool:
        """Whether there are no values, as none of the parameters had a gradient."""
        return self.halves is None and not self.present and not len(self.values)

    def section(self, start: int, length: int) -> Sum:
        """Elements start .. start+length-1, in the same memory."""
        if self.halves is not None:
            left, right = self.halves
            return put_off(left.section(start, length), right.section(start, length))
        return Sum(self.values[start : start + length], self.present, self.owned, self.scale, self.stays)


def nothing() -> Sum:
    """The contribution to parameters that have no gradient."""
    return Sum(torch.empty(0), 0)


def put_off(left: Sum, right: Sum) -> Sum:
    """The sum of two contributions, to be added later."""
    if left.is_nothing or right.is_nothing:
        return right if left.is_nothing else left
    return Sum(torch.empty(0), left.present | right.present, stays=left.stays and right.stays, halves=(left, right))


def weighted(values: torch.Tensor, present: int, samples: int, kind: Kind) -> Sum:
    """The contribution of a micro-batch with gradient `values`, which may be written to: times its samples."""
    if kind in ("max", "sum", "last"):
        return Sum(values, present, owned=True)
    if samples & (samples - 1):
        return Sum(values.mul_(samples), present, owned=True)
    return Sum(values, present, owned=True, scale=float(samples))


def is_change(chunk: Chunk, at_once: bool) -> bool:
    """Whether contributions to a chunk of buffers are their changes: those of sums always, and those of means and counters if
    each is applied `at_once`, so that of micro-batches that began with the same values each one counts."""
    return chunk.kind == "sum" or (at_once and (chunk.kind == "mean" or (chunk.kind == "max" and "int" in chunk.dtype)))


def move(chunk: Chunk, buffer: torch.Tensor, value: torch.Tensor) -> None:
    """Apply one contribution to the buffers of a chunk, or to some of its elements, at once. Of parameters it is their change."""
    if chunk.kind == "param" or is_change(chunk, at_once=True):
        buffer.add_(value)
    elif chunk.kind == "max":
        torch.maximum(buffer, value, out=buffer)
    else:
        buffer.copy_(value)


def adder(chunk: Chunk) -> Callable[[Sum, Sum], Sum]:
    """The function (left, right) -> sum for contributions to `chunk`; it reuses owned memory, the left one's first, and leaves
    alone what stays."""
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
    """Of each piece the right one's value, if it has one, else the left one's."""
    first, second, taken = (left, right, right.present) if left.owned or not right.owned else (right, left, ~right.present)
    values = first.values if first.owned else first.values.clone()
    for bit, piece in enumerate(chunk.pieces):
        if taken >> bit & 1:
            values[piece.offset : piece.offset + piece.length] = second.values[piece.offset : piece.offset + piece.length]
    return Sum(values, left.present | right.present, owned=True)


def last_of(parts: Sequence[Sum], bit: int) -> Sum:
    """Of contributions in order, the last one that has piece number `bit`; the last of all if none has."""
    return next((part for part in reversed(parts) if part.present >> bit & 1), parts[-1])


def add_up(kind: Kind, total: Sum, out: Callable[[int], torch.Tensor], depth: int = 0) -> Sum:
    """`total` with what was put off done: where it was, or in `out(0)`, with `out(1)` and so on for what comes in between."""
    if total.halves is None:
        return total
    left, right = add_up(kind, total.halves[0], out, depth), add_up(kind, total.halves[1], out, depth + 1)
    scale = add_values(kind, left, right, out(depth))
    return Sum(out(depth), total.present, owned=True, scale=scale)


def _added_up(kind: Kind, total: Sum) -> Sum:
    """`total` in memory of its own where adding was put off."""
    first = total
    while first.halves is not None:
        first = first.halves[0]
    made: dict[int, torch.Tensor] = {}
    return add_up(kind, total, lambda depth: made.setdefault(depth, torch.empty_like(first.values)))


def add_values(kind: Kind, left: Sum, right: Sum, out: torch.Tensor) -> float:
    """Write the sum of two contributions to `out`, which may be the memory of one of them; returns the sum's scale."""
    if kind == "max":
        torch.maximum(left.values, right.values, out=out)
        return 1.0
    if left.scale == right.scale:
        torch.add(left.values, right.values, out=out)
        return left.scale
    a, b = left.values * left.scale, right.values * right.scale
    torch.add(a, b, out=out)
    return 1.0
