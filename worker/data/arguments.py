"""The arguments of `run.batches`: a data set, or a DataLoader, and how its samples are ordered, cut and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.data.orders import Order, OrderFunction, order_by, shuffled
from roundtable.worker.data.samplers import inner_of_batch_sampler, order_of_sampler
from roundtable.worker.data.streams.order import StreamOrder
from roundtable.worker.data.streams.sources import is_stream, stream_of
from roundtable.worker.data.streams.stream import Stream


class BatchArguments(TypedDict, total=False):
    """The arguments of `run.batches` beside the data set. All may be left out.

    A run's settings stand in for sizes and epochs. If the data set is a DataLoader, it stands in for anything else.

    - `micro_batch`: the samples of one forward and backward. If there is a DataLoader, its `batch_size` by default.
    - `global_batch`: the samples of one update.
    - `epochs`: passes over the data.
    - `shuffle`: whether samples are shuffled in each epoch (the default), or come in the data set's order. Of streams, shards.
    - `shuffle_window`: samples of a stream in a row that are shuffled in each epoch. 1 by default.
    - `order`: a pure function of (seed, epoch) that gives the indices of an epoch's samples, as many in every epoch.
    - `sampler`: a RandomSampler, SequentialSampler, WeightedRandomSampler, SubsetRandomSampler, DistributedSampler, or indices.
    - `batch_sampler`: a BatchSampler of one of these.
    - `generator`: its seed is added to the run's seed for the order.
    - `drop_last`: leave out the last round of an epoch if it has fewer samples than `global_batch`.
    - `min_micro_batch`: the samples that each micro-batch has at least. 2 keeps BatchNorm from a single sample.
    - `collate_fn`: makes a batch of a list of samples.
    - `num_workers`: processes that load ahead. With 0 the script's own process loads.
    - `prefetch_factor`: batches that each of these keeps ready, 2 by default.
    - `persistent_workers`: keep these from one loop over the same batches to the next.
    - `worker_init_fn`: called in each of these with its number.
    - `timeout`: seconds to wait for a batch of these. 0 waits for ever.
    - `multiprocessing_context`: how these are started, such as "spawn".
    - `pin_memory`: copy batches to pinned memory first. Used on CUDA alone, where it is the default.
    """

    micro_batch: int | None
    global_batch: int | None
    epochs: int | None
    shuffle: bool | None
    shuffle_window: int
    order: OrderFunction | None
    sampler: Any
    batch_sampler: Any
    generator: torch.Generator | None
    drop_last: bool | None
    min_micro_batch: int
    collate_fn: Callable[[list[Any]], Any] | None
    num_workers: int | None
    prefetch_factor: int | None
    persistent_workers: bool | None
    worker_init_fn: Callable[[int], None] | None
    timeout: float | None
    multiprocessing_context: Any
    pin_memory: bool | None


@dataclass(frozen=True)
class Data:
    """The data set, order, sizes and processes that one call of `run.batches` asks for."""

    dataset: Dataset[Any]
    #: Samples of the data set.
    samples: int
    order: Order | StreamOrder
    #: None where the run's settings say it.
    micro_batch: int | None = None
    global_batch: int | None = None
    epochs: int | None = None
    drop_last: bool = False
    min_micro_batch: int = 1
    #: Samples of a stream in a row that are shuffled.
    shuffle_window: int = 1
    collate_fn: Callable[[list[Any]], Any] | None = None
    #: None: on CUDA alone.
    pin_memory: bool | None = None
    #: Arguments of a torch DataLoader about its processes; empty if this process loads.
    processes: Mapping[str, Any] = field(default_factory=dict)

    def pins(self, device: torch.device) -> bool:
        """Return whether batches for a device are copied to pinned memory first."""
        return device.type == "cuda" and self.pin_memory is not False


#: Arguments that say how many processes load, and how.
_OF_PROCESSES = (
    "num_workers", "prefetch_factor", "persistent_workers", "worker_init_fn", "timeout", "multiprocessing_context",
)  # fmt: skip
#: Arguments that need no more than to be kept.
_AS_THEY_ARE = (
    "micro_batch", "global_batch", "epochs", "drop_last", "min_micro_batch", "shuffle_window", "collate_fn", "pin_memory",
)  # fmt: skip
#: Batches that each loading process keeps ready by default.
_PREFETCH = 2
#: Arguments that have another name here.
_OTHER_NAMES = {"batch_size": "micro_batch, the samples of one forward, and global_batch, the samples of one update"}
_MAP_STYLE = (
    "batches() needs a map-style data set (__len__ and __getitem__), so that any worker can load any sample, or a stream (an "
    "IterableDataset or roundtable.Stream)"
)


def resolve(dataset: Any, arguments: BatchArguments, seed: int, epoch: int) -> Data:
    """Return what `run.batches(dataset, **arguments)` asks for, in a run with `seed` whose next epoch is `epoch`.

    Raises UsageError if workers cannot share the data set or the DataLoader, if the order is no pure function of (seed, epoch),
    or if arguments do not go together.
    """
    given: dict[str, Any] = {name: value for name, value in arguments.items() if value is not None}
    for name in arguments.keys() - BatchArguments.__annotations__.keys():
        raise UsageError(
            f"batches() has no argument '{name}': pass {_OTHER_NAMES.get(name, 'one that its documentation names')}."
        )
    if isinstance(dataset, DataLoader):
        given = _of_loader(dataset, given) | given
        dataset = dataset.dataset
    _check_numbers(given)
    if is_stream(dataset):
        dataset = stream_of(dataset)
    elif given.get("shuffle_window", 1) > 1:
        raise UsageError(f"shuffle_window is for streams, but {type(dataset).__name__} is map-style: leave it out.")
    samples = dataset_size(dataset)
    return Data(
        dataset=dataset,
        samples=samples,
        order=_stream_order(given, seed, dataset) if isinstance(dataset, Stream) else _order(given, seed, samples, epoch),
        processes=_processes(given) if given.get("num_workers") else {},
        **{name: given[name] for name in _AS_THEY_ARE if name in given},
    )


def dataset_size(dataset: Any) -> int:
    """Return the number of samples. Raises UsageError unless the data set has samples, and is a `Stream` or map-style."""
    name = type(dataset).__name__
    if isinstance(dataset, Stream):
        return len(dataset)
    if hasattr(type(dataset), "__next__"):
        raise UsageError(
            f"{name} can be read only once, but any worker may have to read any sample: pass an IterableDataset, or "
            "roundtable.Stream(shards, open, samples)."
        )
    if isinstance(dataset, Mapping):
        keys = ", ".join(f"'{key}'" for key in list(dataset)[:5])
        raise UsageError(f"{name} has {keys or 'no keys'} instead of numbered samples: pass the data set under one key.")
    if hasattr(dataset, "iloc"):
        raise UsageError(f"{name} is a table of columns: {_MAP_STYLE}; a list of its rows is one.")
    get = getattr(type(dataset), "__getitem__", None)
    if get is None or get is Dataset.__getitem__ or isinstance(dataset, str | bytes):
        what = "has no length" if not hasattr(type(dataset), "__len__") else "has no samples by number"
        raise UsageError(f"{name} {what}: {_MAP_STYLE}.")
    try:
        size = len(dataset)
    except TypeError:
        raise UsageError(f"{name} has no length: {_MAP_STYLE}.") from None
    if size == 0:
        raise UsageError(f"{name} has no samples.")
    return size


def _of_loader(loader: DataLoader[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a DataLoader's arguments by the names that `run.batches` has for them."""
    name = type(loader).__name__
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise UsageError(
            f"{name} yields batches in a way of its own, which batches() would leave out: pass its data set instead."
        )
    if loader.batch_sampler is None:
        raise UsageError(f"{name} has batch_size=None, so its samples are not batched: give it a batch_size, the micro-batch.")
    sampler, size, drop_last = inner_of_batch_sampler(loader.batch_sampler)
    found = {
        "micro_batch": size,
        "drop_last": drop_last,
        "collate_fn": loader.collate_fn if loader.collate_fn is not default_collate else None,
        "pin_memory": loader.pin_memory or None,  # off is only torch's default
        **{name: getattr(loader, name) for name in _OF_PROCESSES},
    }
    if isinstance(loader.dataset, IterableDataset):
        found["shuffle"] = False
    elif not given.keys() & {"order", "sampler", "batch_sampler", "shuffle"}:
        found["sampler"] = sampler
    if "batch_sampler" in given:  # which has a size of its own
        del found["micro_batch"], found["drop_last"]
    return {name: value for name, value in found.items() if value is not None}


def _check_numbers(given: Mapping[str, Any]) -> None:
    for name in ("micro_batch", "global_batch", "epochs", "min_micro_batch", "shuffle_window"):
        value = given.get(name, 1)
        if not isinstance(value, int) or value < 1:
            raise UsageError(f"{name} is {value!r}: it must be a whole number of at least 1.")
    for name in ("num_workers", "timeout"):
        if given.get(name, 0) < 0:
            raise UsageError(f"{name} is {given[name]}: it must be at least 0.")


def _processes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a DataLoader about its processes."""
    return {"prefetch_factor": _PREFETCH} | {name: given[name] for name in _OF_PROCESSES if name in given}


def _order(given: dict[str, Any], seed: int, samples: int, epoch: int) -> Order:
    """Return the order that arguments ask for."""
    asked: list[str] = [name for name in ("order", "sampler", "batch_sampler") if name in given]
    asked += ["shuffle=True"] if given.get("shuffle") else []
    if len(asked) > 1:
        raise UsageError(f"batches() has both {asked[0]} and {asked[1]}, which each say the order of samples: pass one of them.")
    if "batch_sampler" in given:
        sampler, size, drop_last = inner_of_batch_sampler(given["batch_sampler"])
        if given.get("micro_batch", size) != size:
            raise UsageError(
                f"batch_sampler has batches of {size} but micro_batch is {given['micro_batch']}: leave out one of them."
            )
        given |= {"micro_batch": size, "drop_last": given.get("drop_last", drop_last), "sampler": sampler}
    seed += given["generator"].initial_seed() if "generator" in given else 0
    if "order" in given:
        return order_by(given["order"], seed, samples, epoch)
    if "sampler" in given:
        return order_of_sampler(given["sampler"], seed, samples, epoch)
    return shuffled(samples, given.get("shuffle", True), seed)


def _stream_order(given: Mapping[str, Any], seed: int, stream: Stream) -> StreamOrder:
    """Return the order of a stream that arguments ask for."""
    for name in ("order", "sampler", "batch_sampler"):
        if name in given:
            raise UsageError(
                f"{stream.kind} is a stream, whose samples come by shards: pass shuffle= or shuffle_window= for {name}=."
            )
    seed += given["generator"].initial_seed() if "generator" in given else 0
    return StreamOrder(stream, seed, given.get("shuffle", True), given.get("shuffle_window", 1))
