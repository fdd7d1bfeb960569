"""The order of an epoch's samples: a pure function of (seed, epoch), so that every worker has the same one.

An order has a place for each sample that an epoch uses. It may leave samples out, or have a sample at several places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from roundtable.common.config.batch_plan import Segment, derive_seed
from roundtable.common.runtime.errors import UsageError

#: Return the indices of an epoch's samples for (seed, epoch): a list, an array or a tensor of whole numbers.
OrderFunction = Callable[[int, int], Any]

#: Micro-batches whose samples are sorted by length together.
_SORTED_TOGETHER = 50
#: The categories that torch.multinomial can draw from.
_MOST_WEIGHTS = 1 << 24


class Places(Protocol):
    """The index of a sample for each place of an epoch."""

    def __getitem__(self, place: int, /) -> Any:
        """Return an index as a whole number, or a tensor of one."""


@dataclass(frozen=True)
class Order:
    """The order that a loop over batches has in each of its epochs."""

    #: The name that errors use.
    name: str
    function: OrderFunction
    #: The seed that the function gets.
    seed: int
    #: Samples of the data set.
    samples: int
    #: Places that each epoch has.
    places: int
    #: Whether the name and the seed say all. Workers compare indices otherwise.
    is_named: bool = False

    def of(self, segment: Segment, epoch: int) -> Places:
        """Return the indices of the samples in an epoch of a segment, by place."""
        return self.indices(epoch)

    def indices(self, epoch: int) -> torch.Tensor:
        """Return the indices of an epoch's samples: int64, one for each place.

        Raises UsageError if these are no indices of the data set, or another number than in other epochs.
        """
        indices = _as_indices(self.function(self.seed, epoch), self.name, self.samples)
        if len(indices) != self.places:
            raise UsageError(
                f"the order '{self.name}' has {len(indices)} samples in epoch {epoch} but {self.places} before: every epoch must "
                "have as many."
            )
        return indices


def shuffled(samples: int, shuffle: bool, seed: int = 0) -> Order:
    """Return the order in which all samples come once: shuffled, or as the data set has them."""
    name, function = ("uniform", uniform(samples)) if shuffle else ("sequential", sequential(samples))
    return Order(name, function, seed, samples, samples, is_named=True)


def order_by(function: OrderFunction, seed: int, samples: int, epoch: int) -> Order:
    """Return the order that a function of a script gives for `samples` samples.

    Raises UsageError if it is not a pure function as far as two calls for one `epoch` show, or gives no indices.
    """
    name = getattr(function, "__name__", type(function).__name__)
    if not callable(function):
        raise UsageError(f"order is {function!r}, not a function: pass order=lambda seed, epoch: indices.")
    first, second = (_as_indices(function(seed, epoch), name, samples) for _ in range(2))
    if not torch.equal(first, second):
        raise UsageError(
            f"the order '{name}' gives other indices each time for one epoch: draw them from a generator seeded by (seed, epoch)."
        )
    return Order(name, function, seed, samples, len(first))


def _as_indices(found: Any, name: str, samples: int) -> torch.Tensor:
    """Return what an order has given as indices. Raises UsageError if it is none of the data set."""
    try:
        indices = torch.as_tensor(list(found) if isinstance(found, range) else found)
        is_whole = not indices.is_floating_point() and not indices.is_complex() and indices.dtype != torch.bool
    except (TypeError, ValueError, RuntimeError):
        is_whole = False
    if not is_whole or indices.dim() != 1 or not len(indices):
        raise UsageError(f"the order '{name}' gives {type(found).__name__}, not a list of indices: it must return whole numbers.")
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= samples:
        raise UsageError(
            f"the order '{name}' has index {low if low < 0 else high}, but the data set has {samples} samples: indices go from 0 "
            f"to {samples - 1}."
        )
    return indices.to(torch.int64)


def generator(seed: int, epoch: int) -> torch.Generator:
    """Return the generator that an order of this package draws an epoch from."""
    return torch.Generator().manual_seed(derive_seed(seed, "order", epoch))


# ---- orders without arguments of their own


def uniform(samples: int, places: int | None = None) -> OrderFunction:
    """Return an order in which all samples come once, shuffled. With more `places`, they come again, shuffled anew."""
    count = samples if places is None else places

    def order(seed: int, epoch: int) -> torch.Tensor:
        draw = generator(seed, epoch)
        whole = [torch.randperm(samples, generator=draw) for _ in range(-(-count // samples))]
        return whole[0] if count == samples else torch.cat(whole)[:count]

    return order


def drawn(samples: int, places: int) -> OrderFunction:
    """Return an order in which each place has a sample drawn uniformly, whatever the others have."""
    return lambda seed, epoch: torch.randint(samples, (places,), generator=generator(seed, epoch))


def sequential(samples: int) -> OrderFunction:
    """Return the order that the data set has."""
    return lambda seed, epoch: torch.arange(samples)


def subset(indices: torch.Tensor) -> OrderFunction:
    """Return an order in which the samples of `indices` come once, shuffled."""
    return lambda seed, epoch: indices[torch.randperm(len(indices), generator=generator(seed, epoch))]


# ---- orders that scripts ask for


def weighted_order(
    weights: Sequence[float] | torch.Tensor, samples: int | None = None, replacement: bool = True
) -> OrderFunction:
    """Return an order that draws samples by their weights, as torch.utils.data.WeightedRandomSampler does.

    `weights` has a number of at least 0 for each sample of the data set. `samples` are drawn for an epoch, by default as many as
    there are weights. Without `replacement` a sample comes at most once an epoch.

    Raises UsageError if samples cannot be drawn by these weights.
    """
    chances = torch.as_tensor(weights, dtype=torch.float64).detach().cpu()
    count = len(chances) if samples is None else samples
    can_draw = chances.dim() == 1 and 0 < len(chances) <= _MOST_WEIGHTS and bool((chances >= 0).all() & chances.isfinite().all())
    if not can_draw or not chances.any():
        raise UsageError(
            f"samples cannot be drawn by these weights: pass a number of at least 0 for each of at most {_MOST_WEIGHTS} samples."
        )
    drawable = len(chances) if replacement else int(chances.count_nonzero())
    if count < 1 or (count > drawable and not replacement):
        raise UsageError(f"{count} samples cannot be drawn without replacement, as {drawable} have a weight above 0.")

    def weighted(seed: int, epoch: int) -> torch.Tensor:
        return torch.multinomial(chances, count, replacement, generator=generator(seed, epoch))

    return weighted


def class_balanced_order(labels: Sequence[Any] | torch.Tensor, samples: int | None = None) -> OrderFunction:
    """Return an order in which an epoch has each class equally often, give or take one sample.

    `labels` has the class of each sample of the data set. `samples` are drawn for an epoch, by default as many as there are
    labels. A sample comes again only when all others of its class have come as often. This is class-balanced sampling as in Kang
    et al., "Decoupling representation and classifier for long-tailed recognition" (ICLR 2020), with fixed counts.

    Raises UsageError if there are no labels.
    """
    known, inverse = np.unique(np.asarray(labels), return_inverse=True)
    classes = inverse.reshape(-1)
    count = len(classes) if samples is None else samples
    if not len(known) or count < 1:
        raise UsageError("a class-balanced order needs a label for each sample, and at least one sample an epoch.")
    by_class = torch.from_numpy(classes.argsort(kind="stable")).split(np.bincount(classes).tolist())

    def class_balanced(seed: int, epoch: int) -> torch.Tensor:
        draw = generator(seed, epoch)
        each, more = divmod(count, len(by_class))
        counts = torch.full((len(by_class),), each)
        counts[torch.randperm(len(by_class), generator=draw)[:more]] += 1
        parts = [_cycled(members, wanted, draw) for members, wanted in zip(by_class, counts.tolist(), strict=True)]
        return torch.cat(parts)[torch.randperm(count, generator=draw)]

    return class_balanced


def _cycled(members: torch.Tensor, count: int, draw: torch.Generator) -> torch.Tensor:
    """Return `count` of the members: all of them shuffled, and again, as often as it takes."""
    times = -(-count // len(members))
    order = [torch.randperm(len(members), generator=draw) for _ in range(times)]
    return members[torch.cat(order)[:count]] if order else members[:0]


def length_bucketed_order(lengths: Sequence[int] | torch.Tensor, micro_batch: int) -> OrderFunction:
    """Return an order in which the samples of a micro-batch are of similar length, so that little is padded.

    `lengths` has the length of each sample of the data set, such as its tokens. `micro_batch` is the size of the micro-batches,
    and `global_batch` should be a multiple of it. Every sample comes once an epoch. Shuffled samples are sorted by length within
    each 50 micro-batches, and the micro-batches are shuffled. This is `group_by_length` of Hugging Face's Trainer, with the
    longest samples at no fixed place.

    Raises UsageError if there are no lengths.
    """
    sizes = torch.as_tensor(lengths).detach().cpu()
    if sizes.dim() != 1 or not len(sizes) or micro_batch < 1:
        raise UsageError("a length-bucketed order needs a length for each sample, and a micro_batch of at least 1.")
    whole = len(sizes) // micro_batch

    def length_bucketed(seed: int, epoch: int) -> torch.Tensor:
        draw = generator(seed, epoch)
        shuffled = torch.randperm(len(sizes), generator=draw)
        windows = shuffled.split(_SORTED_TOGETHER * micro_batch)
        by_length = torch.cat([window[sizes[window].argsort(stable=True)] for window in windows])
        micro_batches, last = by_length[: whole * micro_batch].view(whole, micro_batch), by_length[whole * micro_batch :]
        return torch.cat([micro_batches[torch.randperm(whole, generator=draw)].reshape(-1), last])

    return length_bucketed
