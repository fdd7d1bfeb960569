"""Reads samples of a stream by their numbers, and goes on in the shards that are open."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils.data._utils import worker as loading_process

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.data.streams.order import MOST_TRACKS
from roundtable.worker.data.streams.stream import Stream

#: Shards that are kept open, beyond those that the samples of one window are in: those of all tracks, and some to catch up in.
_MOST_OPEN = MOST_TRACKS + 8
_END = object()


@dataclass(eq=False)
class _Reading:
    """An open shard."""

    shard: int
    #: The position of its next sample.
    position: int
    samples: Iterator[Any] | None = None


@dataclass
class _Mean:
    """A mean of durations, in seconds."""

    total: float = 0.0
    count: int = 0

    def add(self, seconds: float) -> None:
        self.total, self.count = self.total + seconds, self.count + 1

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0


class ShardReader:
    """Reads samples in any order, and fast where they follow each other.

    A sample is read from an open shard if one is not past it. If samples lie between, they are read too, unless opening the shard
    again takes less time. Both are measured. With a `window`, samples that were passed over are kept, for they are wanted soon. A
    stream that reads from the start is opened there, and passes over samples here, so that each has random numbers of its own.
    """

    def __init__(self, stream: Stream, window: int = 1) -> None:
        self._stream, self._window = stream, window
        #: The least recently used first.
        self._open: list[_Reading] = []
        #: Samples that were passed over by key, the oldest first.
        self._kept: dict[tuple[int, int], Any] = {}
        #: How long it takes to open a shard and read one sample, and to read one more.
        self._opening, self._reading = _Mean(), _Mean()
        #: Whether samples that are passed over are seeded too: they are wanted later, or draw numbers before the next one does.
        self._seeds_passed = window > 1 or stream.reads_from_start
        self._pid = os.getpid()

    def __reduce__(self) -> Any:
        """Travel to another process without what is open here."""
        return ShardReader, (self._stream, self._window)

    def read(self, epoch: int, sample: int, seed: Callable[[int], None]) -> Any:
        """Return a sample by its number in the stream, as `open` gives it. `seed(sample)` is called before a sample is read.

        Raises UsageError if a shard has fewer samples than the stream says, or more.
        """
        if os.getpid() != self._pid:  # this process is a child, and open files have one position in both
            self._pid, self._open, self._kept = os.getpid(), [], {}
        if (epoch, sample) in self._kept:
            return self._kept.pop((epoch, sample))
        shard, position = self._stream.place(sample)
        reading = self._opened(shard, position)
        while reading.position < position:
            passed = sample - position + reading.position
            value = self._next(reading, passed, seed if self._seeds_passed else None)
            if self._window > 1:
                self._keep((epoch, passed), value)
        return self._next(reading, sample, seed)

    def _opened(self, shard: int, position: int) -> _Reading:
        """Return the open shard to read on in, which may have to be opened at `position`."""
        behind = [reading for reading in self._open if reading.shard == shard and reading.position <= position]
        nearest = max(behind, key=lambda reading: reading.position, default=None)
        if nearest is not None:
            self._open.remove(nearest)
            if self._goes_on(position - nearest.position):
                self._open.append(nearest)
                return nearest
        size = len(self._stream)
        most = _MOST_OPEN + (self._window * len(self._stream.shards) // size if self._window > 1 else 0)
        del self._open[: max(0, len(self._open) + 1 - most)]
        self._open.append(_Reading(shard, 0 if self._stream.reads_from_start else position))
        return self._open[-1]

    def _goes_on(self, between: int) -> bool:
        """Return whether reading on is faster than opening the shard again, if so many samples lie between."""
        if between == 0 or self._stream.reads_from_start or not self._opening.count:
            return True
        return (between + 1) * self._reading.value <= self._opening.value

    def _next(self, reading: _Reading, sample: int, seed: Callable[[int], None] | None) -> Any:
        """Read the sample at which an open shard is."""
        stream, is_new = self._stream, reading.samples is None
        if seed is not None:
            seed(sample)
        began = time.perf_counter()
        try:
            with _as_the_only_process():
                if reading.samples is None:
                    reading.samples = self._iterator(reading)
                value = next(reading.samples, _END)
            (self._opening if is_new else self._reading).add(time.perf_counter() - began)
            if value is _END:
                raise UsageError(
                    f"{stream.name_of(reading.shard)} of {stream.kind} has no sample {reading.position}, though it was said to "
                    f"have {stream.lengths[reading.shard]}: correct this, or delete a cache= that is older than the shard."
                )
            reading.position += 1
            if reading.position == stream.lengths[reading.shard]:
                self._open.remove(reading)
                self._check_end(reading)
        except BaseException:
            self._open = [other for other in self._open if other is not reading]
            raise
        return value

    def _iterator(self, reading: _Reading) -> Iterator[Any]:
        found = self._stream.open(self._stream.shards[reading.shard], reading.position)
        try:
            return iter(found)
        except TypeError:
            raise UsageError(
                f"open(shard, position) of {self._stream.kind} returns {type(found).__name__}: it must return an iterator of "
                "samples."
            ) from None

    def _check_end(self, reading: _Reading) -> None:
        stream = self._stream
        assert reading.samples is not None
        with _as_the_only_process():
            if next(reading.samples, _END) is not _END:
                raise UsageError(
                    f"{stream.name_of(reading.shard)} of {stream.kind} has more than the {stream.lengths[reading.shard]} samples "
                    "that it was said to have: correct this, or delete a cache= that is older than the shard."
                )

    def _keep(self, key: tuple[int, int], value: Any) -> None:
        self._kept[key] = value
        if len(self._kept) > self._window * (2 + len(self._open)):
            del self._kept[next(iter(self._kept))]


@contextmanager
def _as_the_only_process() -> Iterator[None]:
    """Hide from a stream that it is read in one of several loading processes: it would leave out samples for the others."""
    info = loading_process._worker_info
    loading_process._worker_info = None
    try:
        yield
    finally:
        loading_process._worker_info = info
