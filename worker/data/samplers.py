"""Torch's samplers, translated to orders.

A sampler of torch gives each process the samples that it happens to draw. The parameters of the well-known ones say which order
is meant, so they become pure functions of (seed, epoch). Any other sampler is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.data import orders
from roundtable.worker.data.orders import Order, OrderFunction

_ADVICE = "pass order=lambda seed, epoch: indices instead"


def order_of_sampler(sampler: Any, seed: int, samples: int, epoch: int) -> Order:
    """Return the order that a sampler over `samples` samples stands for.

    The seed of its generator, or its own `seed`, is added to `seed`. A list, range, array or tensor of indices is the same order
    in every epoch. Raises UsageError for a sampler that is no pure function of (seed, epoch).
    """
    name = type(sampler).__name__
    if isinstance(sampler, list | tuple | range | np.ndarray | torch.Tensor):
        return orders.order_by(_named(name, lambda seed, epoch: sampler), seed, samples, epoch)
    for kind, translate in _TRANSLATIONS:
        if type(sampler).__iter__ is kind.__iter__:
            _check_size(sampler, name, samples)
            generator = getattr(sampler, "generator", None)
            own = generator.initial_seed() if generator is not None else getattr(sampler, "seed", 0)
            known = translate(sampler)
            if isinstance(known, Order):
                return replace(known, seed=seed + own)
            return orders.order_by(_named(name, known), seed + own, samples, epoch)
    raise UsageError(f"{name} may draw other samples in each worker, so batches() cannot use it: {_ADVICE}.")


def inner_of_batch_sampler(batch_sampler: Any) -> tuple[Any, int, bool]:
    """Return the sampler, the batch size and the drop_last of a BatchSampler. Raises UsageError for any other class."""
    if type(batch_sampler).__iter__ is not BatchSampler.__iter__:
        name = type(batch_sampler).__name__
        raise UsageError(
            f"{name} makes batches of its own, which batches() cannot use: {_ADVICE}, with micro_batch as their size."
        )
    return batch_sampler.sampler, batch_sampler.batch_size, batch_sampler.drop_last


def _named(name: str, function: OrderFunction) -> OrderFunction:
    function.__name__ = name
    return function


def _check_size(sampler: Any, name: str, samples: int) -> None:
    """Raise UsageError if a sampler was made for another data set."""
    source = getattr(sampler, "data_source", getattr(sampler, "dataset", None))
    if source is not None and len(cast(Sized, source)) != samples:
        raise UsageError(f"{name} is over {len(source)} samples but the data set has {samples}: make it for this data set.")


def _random(sampler: Any) -> Order | OrderFunction:
    samples, places = len(sampler.data_source), sampler.num_samples
    if sampler.replacement:
        return orders.drawn(samples, places)
    return orders.uniform(samples, places) if places != samples else orders.shuffled(samples, True)


def _sequential(sampler: Any) -> Order:
    return orders.shuffled(len(sampler.data_source), False)


def _distributed(sampler: Any) -> Order:
    """Translate to an order of all samples, of which each worker gets its share: ranks and padding play no part."""
    return orders.shuffled(len(sampler.dataset), sampler.shuffle)


def _weighted(sampler: Any) -> OrderFunction:
    return orders.weighted_order(sampler.weights, sampler.num_samples, sampler.replacement)


def _subset(sampler: Any) -> OrderFunction:
    return orders.subset(torch.as_tensor(list(sampler.indices)))


#: For a class, the function that translates samplers with its `__iter__`.
_TRANSLATIONS: list[tuple[type[Sampler[int]], Callable[[Any], Order | OrderFunction]]] = [
    (RandomSampler, _random),
    (SequentialSampler, _sequential),
    (DistributedSampler, _distributed),
    (WeightedRandomSampler, _weighted),
    (SubsetRandomSampler, _subset),
]
