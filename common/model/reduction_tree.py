"""The fixed binary tree along which the contributions of a round are summed.

Floating-point addition is not associative, so the order of adding decides the bits. Here the order is a function of the
number of micro-batches K alone: level l of the tree has nodes covering k = i*2^l .. min((i+1)*2^l, K) - 1, a node is the
sum of its two halves, left plus right, and where the right half lies beyond K the node is its left half. Nothing depends
on who computed what, on the order of arrival, or on how many micro-batches came already added up.

Spans are half-open: `(lo, hi)` stands for micro-batches lo .. hi-1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")
Span = tuple[int, int]


def is_node(span: Span, count: int) -> bool:
    """Whether `span` is a node of the tree over `count` leaves."""
    lo, hi = span
    if not 0 <= lo < hi <= count:
        return False
    size = _size(span)
    return lo % size == 0 and hi == min(lo + size, count)


def parent(span: Span, count: int) -> Span:
    """The smallest node that contains the node `span` and more. The root has none: ValueError."""
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
    """The two nodes whose sum the node `span`, of two leaves or more, is."""
    lo, hi = span
    middle = lo + _size(span) // 2
    return (lo, middle), (middle, hi)


def fold(leaves: Mapping[int, T], count: int, add: Callable[[T, T], T]) -> T:
    """Sum `leaves` along the tree over `count`; an absent leaf is skipped, so its sibling stands for both.

    Raises ValueError when no leaf is present.
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
    """The smallest power of two that is no less than the span's length."""
    return 1 << (span[1] - span[0] - 1).bit_length()


class TreeSum(Generic[T]):
    """Adds up nodes of one tree as they come, in any order, each micro-batch once.

    Invariants: the spans held are disjoint nodes of the tree; no two of them are halves of one node (they would have
    been added); each leaf has been counted at most once. Without `joins_root` the two halves of the whole tree are kept
    apart, for who takes the sum to add up on the way.
    """

    def __init__(self, count: int, add: Callable[[T, T], T], joins_root: bool = True) -> None:
        """`add(left, right)` returns the sum and may reuse either operand's memory."""
        self.count = count
        self._joins_root = joins_root
        #: Nodes held now, and their sums.
        self.held: dict[Span, T] = {}
        self._add = add

    def file(self, span: Span, value: T) -> bool:
        """Count `value` as the sum over `span`. False if all of it was counted before, and then nothing changes.

        Where parts of `span` were counted before, the whole takes their place: the tree makes the bits the same.
        Raises ValueError for a span that is no node of the tree.
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
        """The pairs of nodes, each left and right, that are added one after the other when the node `span` is filed now."""
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
        """Whether every micro-batch of the node `span` has been counted."""
        while span not in self.held:
            if span == (0, self.count):
                return self.complete
            span = parent(span, self.count)
        return True

    def _drop(self, span: Span) -> None:
        """Let go of what is held of the node `span`."""
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
        """The sum over all leaves; KeyError before it is complete."""
        return self._add(*self.parts) if len(self.parts) == 2 else self.parts[0]

    @property
    def parts(self) -> list[T]:
        """The sum over all leaves, alone or as the two halves to be added; KeyError before it is complete."""
        whole = (0, self.count)
        return [self.held[whole]] if whole in self.held else [self.held[half] for half in halves(whole)]

    def missing(self) -> list[int]:
        """The micro-batches not counted yet, in order."""
        counted = {k for lo, hi in self.held for k in range(lo, hi)}
        return [k for k in range(self.count) if k not in counted]
