"""Contributions of a worker, and their sums over micro-batches in a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from roundtable.common.model.layout import Layout
from roundtable.common.model.metrics import add_metrics
from roundtable.common.model.partial_sum import Sum, adder
from roundtable.common.model.reduction_tree import TreeSum
from roundtable.common.model.sparse_rows import RowSums, add_tables
from roundtable.common.protocol.messages.gradients import Sums
from roundtable.worker.contribute.backward_overlap import TreeJoin
from roundtable.worker.layers.sharded_loss import HiddenGradient, LayerGradient
from roundtable.worker.replica.gradient_buffers import GradientBuffer

Span = tuple[int, int]


@dataclass
class GradientSum:
    """The contribution of one micro-batch, or the sum of several in a row."""

    #: Where the dense sums lie.
    buffer: GradientBuffer
    #: By chunk: the sum.
    sums: dict[int, Sum]
    #: Gradients of embedding rows.
    rows: RowSums
    #: Gradients of sharded layers.
    uses: list[LayerGradient | HiddenGradient]
    #: By name: the sum of a metric x weight, and the weight.
    metrics: Sums
    #: The weight of the micro-batches in the mean of their round.
    weight: float
    #: Whether each of the micro-batches was finite, if that is checked.
    finite: bool = True

    def joined(self, right: GradientSum, sums: dict[int, Sum]) -> GradientSum:
        """Return both contributions as one, with the given sums, which lie in this contribution's buffer."""
        rows, uses = add_tables(self.rows, right.rows), self.uses + right.uses
        metrics, weight = add_metrics(self.metrics, right.metrics), self.weight + right.weight
        return GradientSum(self.buffer, sums, rows, uses, metrics, weight, self.finite and right.finite)

    @property
    def scale(self) -> float:
        """The factor that the values have yet to be multiplied by."""
        return max((total.scale for total in self.sums.values()), default=1.0)


class GradientAccumulator:
    """The contributions of a round that are not pushed yet, added up along the reduction tree."""

    def __init__(self, layout: Layout) -> None:
        self._chunks = len(layout.chunks)
        self._add: dict[int, Callable[[Sum, Sum], Sum]] = {chunk.id: adder(chunk) for chunk in layout.chunks}
        #: None if there are no contributions.
        self._tree: TreeSum[GradientSum] | None = None
        self._round = -1

    def add(self, round_: int, micro_batches: int, span: Span, contribution: GradientSum) -> None:
        """Add a contribution of micro-batches `span`, in a round of `micro_batches`."""
        if self._tree is None:
            self._tree, self._round = TreeSum(micro_batches, self._add_up), round_
        self._tree.file(span, contribution)

    def before(self, round_: int, k: int) -> GradientSum | None:
        """Return the contribution of the micro-batch before number `k`, if that is held by itself and complete."""
        if self._tree is None or self._round != round_:
            return None
        found = self._tree.held.get((k - 1, k))
        return found if found is not None and len(found.sums) == self._chunks else None

    def remove(self, k: int) -> None:
        """Remove the contribution of micro-batch `k`, which is held by itself."""
        if self._tree is not None:
            del self._tree.held[k, k + 1]

    def joins(self, k: int) -> tuple[Span, list[TreeJoin]]:
        """Return the span that micro-batch `k` completes, and the sums to add it to for that, in order."""
        (lo, hi), joins = (k, k + 1), []
        for left, right in self._tree.joins((lo, hi)) if self._tree is not None else ():
            on_left = left[0] < lo
            assert self._tree is not None
            joins.append(TreeJoin(self._tree.held[left if on_left else right].sums, on_left))
            lo, hi = left[0], right[1]
        return (lo, hi), joins

    def take(self) -> Iterator[tuple[int, Span, GradientSum]]:
        """Remove all contributions, and yield the round, the micro-batches and the sum of each."""
        tree, self._tree = self._tree, None
        for span, total in sorted(tree.held.items(), key=lambda item: item[0]) if tree is not None else ():
            yield self._round, span, total

    def _add_up(self, left: GradientSum, right: GradientSum) -> GradientSum:
        both = left.sums.keys() & right.sums.keys()  # chunks that were pushed early are in one of them only
        is_one_scale = left.scale == right.scale
        sums = {}
        for chunk in both:
            a, b = left.sums[chunk], right.sums[chunk]
            if a.is_nothing or b.is_nothing:
                sums[chunk] = _alone(b if a.is_nothing else a, left.buffer.chunks[chunk], is_one_scale)
            else:
                sums[chunk] = self._add[chunk](a, b)
        right.buffer.taken = False  # the buffers belong to the sums, and the result is in the left one
        return left.joined(right, sums)


def _alone(total: Sum, out: torch.Tensor, keeps_scale: bool) -> Sum:
    """Return a sum, in `out`, to which the other half of a contribution adds nothing. Its scale fits the other chunks' scale."""
    if total.is_nothing:
        return total
    if total.values.data_ptr() != out.data_ptr():
        out.copy_(total.values)
    if not keeps_scale and total.scale != 1.0:
        out.mul_(total.scale)
    return Sum(out, total.present, owned=True, scale=total.scale if keeps_scale else 1.0)
