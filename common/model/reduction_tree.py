"""The reduction tree: the fixed binary tree along which the contributions of a round are summed.

Floating-point addition is not associative, so the order decides the bits. Here the order depends on the number of micro-batches K
alone. Level l of the tree has nodes that cover k = i*2^l .. min((i+1)*2^l, K) - 1. A node is the sum of its two halves, left plus
right. If the right half lies beyond K, the node is its left half. The bits do not depend on which worker computed what, on the
order of arrival, or on how many micro-batches came already added up.

Spans are half-open: `(lo, hi)` stands for micro-batches lo .. hi-1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")
Span = tuple[int, int]


def is_node(span: Span, count: int) -> bool:
    """Return whether `span` is a node of the tree over `count` leaves."""
    lo, hi = span
    if not 0 <= lo < hi <= count:
        return False
    size = _size(span)
    return lo % size == 0 and hi == min(lo + size, count)


def parent(span: Span, count: int) -> Span:
    """Return the smallest node that contains the node `span` and more. Raises ValueError for the root, which has none."""
    if span == (0, count):
        raise ValueError("the root of the tree has no parent")
    lo, size = span[0], _size(span)
    while True:
        size *= 2
        lo = lo // size * size
        node = (lo, min(lo + size, count))
        if node != span:
            return node


def halves(span: Span) -> tuple[Span, Span]:
    """Return the two nodes whose sum is the node `span`, which has two leaves or more."""
    lo, hi = span
    middle = lo + _size(span) // 2
    return (lo, middle), (middle, hi)


def fold(leaves: Mapping[int, T], count: int, add: Callable[[T, T], T]) -> T:
    """Return the sum of `leaves` along the tree over `count`. If a leaf is absent, its sibling stands for both.

    Raises ValueError if no leaf is present.
    """

    def node(span: Span) -> T | None:
        if span[1] - span[0] == 1:
            return leaves.get(span[0])
        left, right = (node(half) for half in halves(span))
        if left is None or right is None:
            return right if left is None else left
        return add(left, right)

    total = node((0, count))
    if total is None:
        raise ValueError("a sum needs at least one contribution")
    return total


def _size(span: Span) -> int:
    """Return the smallest power of two that is not less than the span's length."""
    return 1 << (span[1] - span[0] - 1).bit_length()


class TreeSum(Generic[T]):
    """Adds up nodes of one tree as they come, in any order, each micro-batch once.

    Invariants: the spans held are disjoint nodes of the tree. No two of them are halves of one node, because they would have
    been added. Each leaf has been counted at most once. Without `joins_root`, the two halves of the whole tree stay apart, and
    the receiver of the sum adds them up.
    """

    def __init__(self, count: int, add: Callable[[T, T], T], joins_root: bool = True) -> None:
        """`add(left, right)` returns the sum and may reuse either operand's memory."""
        self.count = count
        self._joins_root = joins_root
        #: The nodes held now, and their sums.
        self.held: dict[Span, T] = {}
        self._add = add

    def file(self, span: Span, value: T) -> bool:
        """Count `value` as the sum over `span`, and return True. Return False if all of it was counted before; nothing changes
        then.

        If parts of `span` were counted before, the whole replaces them: the tree gives the same bits. Raises ValueError for a
        span that is no node of the tree.
        """
        if not is_node(span, self.count):
            raise ValueError(f"micro-batches {span[0]}..{span[1] - 1} are no node of the tree over {self.count}")
        if self.covers(span):
            return False
        self._drop(span)
        self.held[span] = value
        for left, right in self.joins(span):
            self.held[left[0], right[1]] = self._add(self.held.pop(left), self.held.pop(right))
        return True

    def joins(self, span: Span) -> list[tuple[Span, Span]]:
        """Return the pairs of nodes, left and right, that are added one after the other if the node `span` is filed now."""
        out = []
        while span != (0, self.count):
            left, right = halves(parent(span, self.count))
            other = right if span == left else left
            span = parent(span, self.count)
            if other not in self.held or (span == (0, self.count) and not self._joins_root):
                break
            out.append((left, right))
        return out

    def covers(self, span: Span) -> bool:
        """Return whether every micro-batch of the node `span` has been counted."""
        while span not in self.held:
            if span == (0, self.count):
                return self.complete
            span = parent(span, self.count)
        return True

    def _drop(self, span: Span) -> None:
        """Remove what is held of the node `span`."""
        if span in self.held:
            del self.held[span]
        elif span[1] - span[0] > 1:
            for half in halves(span):
                self._drop(half)

    @property
    def complete(self) -> bool:
        whole = (0, self.count)
        return whole in self.held or (self.count > 1 and all(half in self.held for half in halves(whole)))

    @property
    def total(self) -> T:
        """The sum over all leaves. Raises KeyError before it is complete."""
        return self._add(*self.parts) if len(self.parts) == 2 else self.parts[0]

    @property
    def parts(self) -> list[T]:
        """The sum over all leaves, alone or as two halves to add. Raises KeyError before it is complete."""
        whole = (0, self.count)
        return [self.held[whole]] if whole in self.held else [self.held[half] for half in halves(whole)]

    def missing(self) -> list[int]:
        """Return the micro-batches that are not counted yet, in order."""
        counted = {k for lo, hi in self.held for k in range(lo, hi)}
        return [k for k in range(self.count) if k not in counted]
