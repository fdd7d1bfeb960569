"""A stream: shards of samples that can be opened at a position.

Samples have numbers through the whole stream, shard after shard. So a stream has what a map-style data set has: a length, and a
sample for each number. `reader.py` reads them, and `order.py` says in which order.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import logging
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.data.streams.caches import read_cache, write_cache

log = logging.getLogger("roundtable.worker.data")

#: Open a shard at a position: return an iterator of its samples from there on.
Opener = Callable[[Any, int], Iterable[Any]]
#: The samples of each shard: one number for all, a list, or a function that counts those of a shard.
Lengths = int | Sequence[int] | Callable[[Any], int] | None

#: Seconds of counting after which a warning says what to do.
_LONG_S = 10.0


class Stream(IterableDataset[Any]):
    """Shards of samples that can be opened at a position, for `run.batches`.

    `shards` are names, or anything else that `open` takes, in a fixed order; a number n stands for 0 to n - 1.
    `open(shard, position)` returns an iterator over the shard's samples from number `position` on. It must give the same samples
    each time it is called, in every process.

    `samples` has the number of samples of each shard, or one number for all. It may be a function that counts those of a shard.
    Without `samples`, each shard is read once and counted. `cache` is a JSON file that keeps counts, by the shard's text.

    `decode(sample)` makes a sample for the script of what `open` gives. It is called only for samples that this worker needs.
    Random numbers of torch, numpy and Python are seeded by (seed, epoch, sample) before each sample is read, and before it is
    decoded.

    A loop over the stream itself gives all samples in the order of `shards`, as `torch.utils.data.DataLoader` needs it.

    Raises UsageError if there are no shards, or if `samples` has not one number for each.
    """

    def __init__(
        self,
        shards: Sequence[Any] | int,
        open: Opener,
        samples: Lengths = None,
        *,
        decode: Callable[[Any], Any] | None = None,
        cache: str | Path | None = None,
    ) -> None:
        self.shards: list[Any] = list(range(shards)) if isinstance(shards, int) else list(shards)
        self.open, self.decode = open, decode
        self._samples, self._cache = samples, Path(cache) if cache is not None else None
        #: The name of the class that this stream was made of. Workers compare it.
        self.kind = type(self).__name__
        #: Whether `open` reads a shard from its start in any case. Then going on in an open one is never slower.
        self.reads_from_start = False
        if not self.shards:
            raise UsageError("the stream has no shards: pass the shards' names, or their number.")
        if samples is not None and not isinstance(samples, int) and not callable(samples) and len(samples) != len(self.shards):
            raise UsageError(
                f"the stream has {len(self.shards)} shards, but samples has {len(samples)} numbers: pass one for each shard."
            )

    def __len__(self) -> int:
        """Return the number of samples in all shards."""
        return self.ends[-1]

    def __iter__(self) -> Iterator[Any]:
        """Yield all samples, shard after shard."""
        for shard in self.shards:
            yield from self.open(shard, 0) if self.decode is None else map(self.decode, self.open(shard, 0))

    def __repr__(self) -> str:
        return f"{self.kind}({len(self.shards)} shards)"

    @cached_property
    def lengths(self) -> list[int]:
        """The samples of each shard. They are counted at the first use, if nothing says them.

        Raises UsageError for a number that is none, or if there are no samples at all.
        """
        lengths = self._counted() if self._samples is None or callable(self._samples) else self._said(self._samples)
        if not sum(lengths):
            raise UsageError(f"{self!r} has no samples.")
        return lengths

    @cached_property
    def ends(self) -> list[int]:
        """For each shard, one past the number of its last sample in the stream."""
        return list(itertools.accumulate(self.lengths))

    def place(self, sample: int) -> tuple[int, int]:
        """Return the shard of a sample, and the sample's position in it. Samples are numbered through the stream."""
        shard = bisect.bisect_right(self.ends, sample)
        return shard, sample - self.first(shard)

    def first(self, shard: int) -> int:
        """Return the number of a shard's first sample in the stream."""
        return self.ends[shard] - self.lengths[shard]

    def name_of(self, number: int) -> str:
        """Return how errors call a shard."""
        shard = self.shards[number]
        return f"shard {number}" if isinstance(shard, int) else f"shard {number} ({str(shard)[:200]!r})"

    def _said(self, samples: int | Sequence[int]) -> list[int]:
        found = [samples] * len(self.shards) if isinstance(samples, int) else samples
        return [self._length(number, length) for number, length in enumerate(found)]

    def _length(self, number: int, length: Any) -> int:
        """Return a shard's number of samples, which the script has said."""
        with contextlib.suppress(TypeError):
            if (found := operator.index(length)) >= 0:
                return found
        raise UsageError(f"{self.name_of(number)} has {length!r} samples: this must be a whole number of at least 0.")

    def _counted(self) -> list[int]:
        """Return the samples of each shard, from the cache as far as it has them."""
        known: dict[str, int] = read_cache(self._cache) if self._cache is not None else {}
        count: Callable[[Any], int] = self._samples if callable(self._samples) else self._count
        names, warns_at = [str(shard) for shard in self.shards], time.monotonic() + _LONG_S
        is_complete = all(name in known for name in names)
        for number, (name, shard) in enumerate(zip(names, self.shards, strict=True)):
            if name not in known:
                known[name] = self._length(number, count(shard))
            if time.monotonic() > warns_at:
                log.warning(
                    "counting the samples of %s takes long (%d of %d shards so far): pass samples=, or cache= to count once.",
                    self.kind, number + 1, len(names),
                )  # fmt: skip
                warns_at = float("inf")
        if self._cache is not None and not is_complete:
            write_cache(self._cache, known)
        return [known[name] for name in names]

    def _count(self, shard: Any) -> int:
        return sum(1 for _ in self.open(shard, 0))
