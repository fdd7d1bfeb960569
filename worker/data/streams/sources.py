"""Streams of what scripts have: data sets that say their shards, Hugging Face streaming data sets, and plain iterable ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.data.streams.stream import Lengths, Stream

#: Where a data set keeps the stream that was made of it, so that its samples are counted once.
_KEPT = "_roundtable_stream"


def is_stream(dataset: Any) -> bool:
    """Return whether `stream_of` makes a stream of a data set, rather than samples being loaded by number."""
    if isinstance(dataset, IterableDataset):
        has_numbers = hasattr(type(dataset), "__len__") and type(dataset).__getitem__ is not Dataset.__getitem__
        return not has_numbers
    return _has_shards(dataset) and not hasattr(type(dataset), "__len__")


def stream_of(dataset: Any, samples: Lengths = None, *, cache: str | Path | None = None) -> Stream:
    """Return the stream that a data set is read as. `run.batches` calls this for what is no map-style data set.

    - A data set with `num_shards` and `open_shard(shard, position)`, as `Stream` takes them. It may have `shard_lengths`, a list.
    - A Hugging Face `IterableDataset`. Its shards are read from their start, because its `state_dict` may lose samples.
    - Any other `IterableDataset` with `__len__`, or with `samples`: one shard, which every worker reads from its start. It must
      give the same samples in each loop. Of one that never ends, `samples` are an epoch.

    `samples` and `cache` are as those of `Stream`.

    Raises UsageError for a data set of any other kind, and for a plain one whose number of samples nothing says.
    """
    if isinstance(dataset, Stream):
        return dataset
    known = getattr(dataset, _KEPT, None)
    if samples is None and cache is None and isinstance(known, Stream):
        return known
    stream = _stream_of(dataset, samples, cache)
    stream.kind = type(dataset).__name__
    if samples is None and cache is None and hasattr(dataset, "__dict__"):
        setattr(dataset, _KEPT, stream)
    return stream


def _stream_of(dataset: Any, samples: Lengths, cache: str | Path | None) -> Stream:
    name = type(dataset).__name__
    if callable(getattr(dataset, "open_shard", None)) and hasattr(dataset, "num_shards"):
        lengths = getattr(dataset, "shard_lengths", None) if samples is None else samples
        return Stream(dataset.num_shards, dataset.open_shard, lengths, cache=cache)
    if _has_shards(dataset):
        stream = Stream(dataset.num_shards, _HuggingFaceShards(dataset), samples, cache=cache)
    elif isinstance(dataset, IterableDataset):
        stream = Stream(1, _FromTheStart(dataset, samples), _size(dataset, samples))
    else:
        raise UsageError(f"{name} is no stream: pass an IterableDataset, or roundtable.Stream(shards, open, samples).")
    stream.reads_from_start = True
    return stream


def _has_shards(dataset: Any) -> bool:
    """Return whether a data set is Hugging Face's, or says its shards as that does."""
    return hasattr(dataset, "num_shards") and callable(getattr(dataset, "shard", None))


def _size(dataset: Any, samples: Lengths) -> int:
    if samples is None:
        try:
            return len(dataset)
        except (TypeError, NotImplementedError):
            if type(dataset).__module__.startswith("webdataset"):
                raise UsageError(
                    "a WebDataset pipeline cannot begin at a position: pass roundtable.tar_stream(shards, decode) with its tar "
                    "files."
                ) from None
            raise UsageError(
                f"{type(dataset).__name__} has no length, so nobody knows when an epoch ends: pass "
                "roundtable.stream_of(dataset, samples=...), or give it num_shards and open_shard(shard, position)."
            ) from None
    if not isinstance(samples, int):
        raise UsageError(f"{type(dataset).__name__} is one shard: samples must be a number.")
    return samples


class _HuggingFaceShards:
    """Opens one shard of a Hugging Face data set, which reads on from its start."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __call__(self, shard: int, position: int) -> Iterator[Any]:
        one = self._dataset.shard(num_shards=self._dataset.num_shards, index=shard)
        return itertools.islice(iter(one), position, None)


class _FromTheStart:
    """Opens a plain iterable data set, by reading it from its start."""

    def __init__(self, dataset: IterableDataset[Any], samples: Lengths) -> None:
        """`samples`: where to end. None: where the data set ends."""
        self._dataset, self._end = dataset, samples

    def __call__(self, shard: int, position: int) -> Iterator[Any]:
        assert self._end is None or isinstance(self._end, int)
        return itertools.islice(iter(self._dataset), position, self._end)
