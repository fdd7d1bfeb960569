"""Samples for micro-batches. They are the same, with the same augmentation, on any worker.

(seed, epoch) seeds the order of a data epoch. (seed, epoch, sample) seeds a sample's augmentation. (seed, round, k) seeds
everything else that is random in a micro-batch, such as dropout.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sized
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from roundtable.common.config.batch_plan import Round, Segment, Task, derive_seed
from roundtable.common.runtime.errors import UsageError

#: Batches that each loading process keeps ready.
_PREFETCH = 2


def seed_everything(seed: int) -> None:
    """Seed torch (all devices in use), numpy and Python. The effect is that of torch.manual_seed, at a hundredth of the time."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


def dataset_size(dataset: Dataset[Any]) -> int:
    """Return the number of samples. Raises UsageError unless the dataset is map-style and has samples."""
    try:
        size = len(cast(Sized, dataset))
    except TypeError:
        raise UsageError(
            f"{type(dataset).__name__} has no length: batches() needs a map-style dataset (__len__ and __getitem__), so that "
            "any worker can load any sample."
        ) from None
    if size == 0:
        raise UsageError(f"{type(dataset).__name__} has no samples.")
    return size


class Samples(Dataset[Any]):
    """The user's dataset, with random numbers that are seeded for each sample by (seed, epoch, sample)."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        seed_everything(derive_seed(self._seed, "sample", epoch, index))
        return self._dataset[index]


class Loader:
    """Loads micro-batches of one segment, in this process or ahead of time in others."""

    def __init__(
        self,
        dataset: Dataset[Any],
        segment: Segment,
        seed: int,
        *,
        shuffle: bool,
        num_workers: int,
        collate_fn: Callable[[list[Any]], Any] | None,
        forecast: Callable[[], Iterator[Task]],
    ) -> None:
        """`forecast()` yields the tasks that this worker will probably get. It may never end."""
        self._samples = Samples(dataset, seed)
        self._segment = segment
        self._seed = seed
        self._shuffle = shuffle
        self._collate = collate_fn or default_collate
        self._forecast = forecast
        self._orders: dict[int, torch.Tensor] = {}
        #: Tasks that the loading processes have got and not delivered, in order.
        self._ordered: deque[Task] = deque()
        #: Batches that were delivered and not used yet.
        self._ready: dict[Task, Any] = {}
        self._batches: Iterator[Any] | None = None
        if num_workers:
            self._batches = iter(
                DataLoader(
                    self._samples,
                    batch_sampler=_Feed(self._ahead),
                    num_workers=num_workers,
                    collate_fn=self._collate,
                    prefetch_factor=_PREFETCH,
                )
            )

    def load(self, task: Task) -> Any:
        """Return the micro-batch of `task`."""
        for old in [t for t in self._ready if t.round < task.round]:
            del self._ready[old]
        while self._batches is not None and task in self._ordered:
            self._ready[self._ordered.popleft()] = next(self._batches)
        if task in self._ready:
            return self._ready.pop(task)
        return self._collate([self._samples[key] for key in self._keys(task)])

    def close(self) -> None:
        """End the loading processes.

        The garbage collector would wait for them in vain. It collects them and the queues that tell them to end in any order,
        because they refer to each other through this object.
        """
        self._batches = None

    def _keys(self, task: Task) -> list[tuple[int, int]]:
        """Return (epoch, sample) for each of the micro-batch's samples."""
        plan: Round = self._segment.round(task.round)
        order = self._order(plan.epoch)
        return [(plan.epoch, int(order[place])) for place in plan.places(task.k)]

    def _order(self, epoch: int) -> torch.Tensor:
        if epoch not in self._orders:
            for old in [e for e in self._orders if e < epoch - 1]:
                del self._orders[old]
            generator = torch.Generator().manual_seed(derive_seed(self._seed, "order", epoch))
            size = self._segment.samples
            self._orders[epoch] = torch.randperm(size, generator=generator) if self._shuffle else torch.arange(size)
        return self._orders[epoch]

    def _ahead(self) -> Iterator[list[tuple[int, int]]]:
        for task in self._forecast():
            self._ordered.append(task)
            yield self._keys(task)


class _Feed:
    """A batch sampler for a DataLoader: lists of keys, made when it asks for them."""

    def __init__(self, make: Callable[[], Iterator[list[tuple[int, int]]]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._make()
