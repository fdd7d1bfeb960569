"""The batches that `run.batches` gives to a script."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from roundtable.common.config.batch_plan import Segment
from roundtable.worker.data.arguments import Data
from roundtable.worker.session.segments import Segments


class Batches:
    """This worker's micro-batches. Each loop over them is a segment of the run, as each loop over a DataLoader is an epoch."""

    def __init__(self, data: Data, segments: Segments, loop: Callable[[Data, Segment], Iterator[Any]]) -> None:
        """`loop` trains a segment. Raises UsageError if there can be none."""
        self._data, self._segments, self._loop = data, segments, loop
        #: The segment and length of the loop that goes on; None between two loops.
        self._segment: Segment | None = None
        self._length: int | None = None
        segments.planned = segments.plan(data)

    def __iter__(self) -> Iterator[Any]:
        """Yield the micro-batches of the next segment until all its rounds are complete."""
        segment = self._segments.plan(self._data)
        self._length, self._segment = self._segments.expected(segment), segment
        try:
            yield from self._loop(self._data, segment)
        finally:
            self._length = self._segment = None

    def __len__(self) -> int:
        """Return how many micro-batches this worker is expected to compute in a loop, by its share as the loop begins.

        It may come to a few more or fewer, because shares follow the workers' speed.
        """
        return self._segments.expected(self._segments.plan(self._data)) if self._length is None else self._length

    @property
    def rounds(self) -> int:
        """The rounds of one loop: the steps of the optimizer, on any number of workers."""
        return (self._segment or self._segments.plan(self._data)).rounds
