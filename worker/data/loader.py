"""Samples for micro-batches. They are the same, with the same augmentation, on any worker.

(seed, epoch) seeds the order of a data epoch. (seed, epoch, sample) seeds a sample's augmentation. (seed, round, k) seeds
everything else that is random in a micro-batch, such as dropout.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from roundtable.common.config.batch_plan import Round, Segment, Task, derive_seed
from roundtable.common.runtime.errors import UsageError
from roundtable.worker.data.arguments import Data
from roundtable.worker.data.devices import move
from roundtable.worker.data.orders import Places
from roundtable.worker.data.streams.reader import ShardReader
from roundtable.worker.data.streams.stream import Stream

_CPU = torch.device("cpu")


def seed_everything(seed: int) -> None:
    """Seed torch (all devices in use), numpy and Python. The effect is that of torch.manual_seed, at a hundredth of the time."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


class Samples(Dataset[Any]):
    """The user's dataset, with random numbers that are seeded for each sample by (seed, epoch, sample)."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        seed_everything(derive_seed(self._seed, "sample", epoch, index))
        return self._dataset[index]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Any]:
        return [self[key] for key in keys]


class StreamSamples(Dataset[Any]):
    """The samples of a stream by number, with random numbers that are seeded for each sample by (seed, epoch, sample)."""

    def __init__(self, stream: Stream, seed: int, window: int = 1) -> None:
        self._decode, self._seed = stream.decode, seed
        self._reader = ShardReader(stream, window)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key

        def seed(sample: int) -> None:
            seed_everything(derive_seed(self._seed, "sample", epoch, sample))

        sample = self._reader.read(epoch, index, seed)
        if self._decode is None:
            return sample
        seed(index)  # again, because reading may have drawn random numbers for other samples
        return self._decode(sample)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Any]:
        """Return the samples of a micro-batch. They are read in the order of the shards."""
        found = {key: self[key] for key in sorted(keys)}
        return [found[key] for key in keys]


def samples_of(dataset: Any, seed: int, window: int = 1) -> Samples | StreamSamples:
    """Return the samples of a data set by (epoch, index). Of a stream, `window` samples in a row are shuffled."""
    return StreamSamples(dataset, seed, window) if isinstance(dataset, Stream) else Samples(dataset, seed)


class Processes:
    """Loads ahead in other processes, which may stay from one loop over the same batches to the next."""

    def __init__(self, data: Data, seed: int, device: torch.device) -> None:
        self.data = data
        self._feed = _Feed()
        self._batches = DataLoader(
            samples_of(data.dataset, seed, data.shuffle_window),
            batch_sampler=self._feed,
            collate_fn=data.collate_fn or default_collate,
            pin_memory=data.pins(device),
            **data.processes,
        )

    def begin(self, make: Callable[[], Iterator[list[tuple[int, int]]]]) -> Iterator[Any]:
        """Yield the batches whose samples `make()` lists."""
        self._feed.make = make
        return iter(self._batches)

    def end(self) -> None:
        """Forget the lists of the loop that has ended."""
        self._feed.make = None


class Loader:
    """Loads micro-batches of one segment, in this process or ahead of time in others."""

    def __init__(
        self,
        data: Data,
        segment: Segment,
        seed: int,
        *,
        forecast: Callable[[], Iterator[Task]],
        processes: Processes | None = None,
        device: torch.device = _CPU,
    ) -> None:
        """`forecast()` yields the tasks that this worker will probably get. It may never end.

        Batches come on `device`.
        """
        self._data = data
        self._samples = samples_of(data.dataset, seed, data.shuffle_window)
        self._segment = segment
        self._collate = data.collate_fn or default_collate
        self._forecast = forecast
        self._device = device
        self._pin = data.pins(device)
        self._orders: dict[int, Places] = {}
        #: Tasks that the loading processes have got and not delivered, in order.
        self._ordered: deque[Task] = deque()
        #: Batches that were delivered and not used yet.
        self._ready: dict[Task, Any] = {}
        self._processes = processes
        self._batches: Iterator[Any] | None = processes.begin(self._ahead) if processes is not None else None

    def load(self, task: Task) -> Any:
        """Return the micro-batch of `task`, on the device."""
        return move(self._load(task), self._device, self._pin)

    def _load(self, task: Task) -> Any:
        for old in [t for t in self._ready if t.round < task.round]:
            del self._ready[old]
        while self._batches is not None and task in self._ordered:
            self._ready[self._ordered.popleft()] = self._next_batch()
        if task in self._ready:
            return self._ready.pop(task)
        return self._collate(self._samples.__getitems__(self._keys(task)))

    def _next_batch(self) -> Any:
        """Return what loading processes deliver. Raises UsageError as they have raised it, without their traceback."""
        assert self._batches is not None
        try:
            return next(self._batches)
        except UsageError as error:
            sentence = str(error).rpartition("UsageError: ")[2].strip()
            error.__traceback__ = None  # its frames refer to it, and to the processes
        raise UsageError(sentence)

    def close(self) -> None:
        """End the loading processes, unless they are kept.

        The garbage collector would wait for them in vain. It collects them and the queues that tell them to end in any order,
        because they refer to each other through this object.
        """
        self._batches = None
        if self._processes is not None:
            self._processes.end()

    def _keys(self, task: Task) -> list[tuple[int, int]]:
        """Return (epoch, sample) for each of the micro-batch's samples."""
        plan: Round = self._segment.round(task.round)
        order = self._order(plan.epoch)
        return [(plan.epoch, int(order[place])) for place in plan.places(task.k)]

    def _order(self, epoch: int) -> Places:
        if epoch not in self._orders:
            for old in [e for e in self._orders if e < epoch - 1]:
                del self._orders[old]
            self._orders[epoch] = self._data.order.of(self._segment, epoch)
        return self._orders[epoch]

    def _ahead(self) -> Iterator[list[tuple[int, int]]]:
        for task in self._forecast():
            self._ordered.append(task)
            yield self._keys(task)


class _Feed:
    """A batch sampler for a DataLoader: lists of keys, made when it asks for them."""

    def __init__(self) -> None:
        self.make: Callable[[], Iterator[list[tuple[int, int]]]] | None = None

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.make() if self.make is not None else iter([])
