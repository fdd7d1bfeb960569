"""Spans: the parts of a chunk that codecs process one by one. They are so small that intermediate results stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

#: Elements of a span: 1 MiB as float32. Half of that took a quarter longer, because of the number of calls.
SPAN = 1 << 18


@dataclass(frozen=True)
class Span:
    """Elements start .. stop-1, which are blocks first .. last-1."""

    start: int
    stop: int
    first: int
    last: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the span's elements of a whole tensor, in the same memory."""
        return flat[self.start : self.stop]

    def blocks(self, elements: torch.Tensor) -> torch.Tensor:
        """Return the span's elements (1-D) as a row for each block, in the same memory."""
        return elements.view(self.last - self.first, -1)


def spans(numel: int, block: int = 1) -> Iterator[Span]:
    """Yield spans of whole blocks that make up 0 .. numel-1. A shorter last block is a span by itself."""
    whole = numel // block
    step = SPAN // block
    for first in range(0, whole, step):
        last = min(first + step, whole)
        yield Span(first * block, last * block, first, last)
    if whole * block < numel:
        yield Span(whole * block, numel, whole, whole + 1)
