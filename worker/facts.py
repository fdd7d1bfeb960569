"""Facts about a worker's schedule, data and settings. The coordinator compares them with those of other workers."""

from __future__ import annotations

import hashlib
import logging
import math
import multiprocessing
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset

from roundtable.common.config.batch_plan import Segment
from roundtable.common.config.worker_facts import MOST_FACTS, MOST_NUMBERS, Fact
from roundtable.common.runtime.errors import UsageError
from roundtable.worker.data.loader import Samples, StreamSamples, samples_of
from roundtable.worker.data.orders import Order
from roundtable.worker.data.streams.order import StreamOrder
from roundtable.worker.data.streams.stream import Stream
from roundtable.worker.optim.optimizer import Hypers
from roundtable.worker.replica.buffers import Constant, parts_of

log = logging.getLogger("roundtable.worker.alike")

#: Steps of a schedule that are compared at most. They are computed before the first batch.
_STEPS = 3000
#: Samples of a data set that are compared, and the seconds after which no more samples are loaded.
_SAMPLES, _SAMPLES_S = 4, 2.0
#: Relative difference below which two numbers of samples are equal. Image decoders differ by more than rounding.
_WITHIN = 1e-3


# ---- settings


def setting(name: str, value: object) -> Fact:
    """Return a fact about a setting whose text must be equal on all workers."""
    return Fact(name, str(value)[:200])


def called(function: Any) -> str:
    """Return the name of a function or class, without its address."""
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return str(name)[:200]


def constant_facts(constants: Sequence[Constant]) -> list[Fact]:
    """Return facts about buffers that do not travel, because each worker makes its own."""
    return [_fact(f"the buffer '{constant.name}'", constant.tensor) for constant in constants[:50]]


class ScheduleFacts:
    """Computes a schedule's settings by round. They depend on the round alone, so all workers must have the same ones."""

    def __init__(self, hypers: Hypers) -> None:
        """`hypers` is stepped here, so nothing else may use it."""
        self._hypers = hypers
        self._steps = 0
        self._state = dict(hypers.scheduler.state_dict()) if hypers.scheduler is not None else {}

    def of(self, segment: Segment) -> list[Fact]:
        """Return facts about a segment's rounds: the settings in some rounds, and their mean over all rounds.

        Segments must come in order.
        """
        scheduler = self._hypers.scheduler
        facts = [setting("the schedule", type(scheduler).__name__), *_plain_facts("the schedule's", self._state)]
        rounds = range(segment.first_round, segment.first_round + min(segment.rounds, max(0, _STEPS - self._steps)))
        self._steps += len(rounds)
        if isinstance(scheduler, ReduceLROnPlateau) or not rounds:
            return facts
        shown = {rounds[at] for at in (0, 1, 2, 4, 8, 16, 64, 256, 1024, len(rounds) - 1) if at < len(rounds)}
        sums: dict[str, list[float]] = {}
        try:
            for round_ in rounds:
                self._hypers.at(round_, segment.round(round_).epoch)
                for key, values in _by_key(self._hypers.groups).items():
                    if key == "lr" and round_ in shown:
                        facts.append(_rate(f"{key} in round {round_}", values))
                    known = sums.setdefault(key, [0.0] * len(values))
                    sums[key] = [a + b for a, b in zip(known, values, strict=True)]
        except Exception as error:  # if it fails in training too, the error is raised there
            log.debug("the schedule is not compared: %s", error)
            return facts
        of = f"in rounds {rounds[0]} to {rounds[-1]}, of which the mean is"
        return facts + [_rate(f"{key} {of}", [value / len(rounds) for value in values]) for key, values in sums.items()]


def optimizer_facts(optimizer: torch.optim.Optimizer) -> list[Fact]:
    """Return facts about an optimizer that runs on the workers."""
    facts = [setting("the optimizer", type(optimizer).__name__)]
    for number, group in enumerate(optimizer.param_groups[:20]):
        facts += _plain_facts(f"parameter group {number}'s", {key: group[key] for key in group if key != "params"})
    return facts[: MOST_FACTS // 2]


def _plain_facts(whose: str, values: Mapping[str, Any]) -> list[Fact]:
    """Return a fact about each plain value."""
    facts = []
    for key, value in values.items():
        items: Any = list(value.items()) if isinstance(value, Mapping) else value
        if isinstance(items, int | float | str | bool | list | tuple | type(None)) and len(text := str(items)) <= 200:
            name = f"{whose} {key}"
            facts.append(_rate(name, [items]) if isinstance(items, float) else Fact(name, text))
    return facts


def _rate(name: str, values: Sequence[float]) -> Fact:
    return Fact(name, "", list(values)[:MOST_NUMBERS], 1e-6)


def _by_key(groups: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the numbers of all groups by the name of the setting."""
    out: dict[str, list[float]] = {}
    for group in groups:
        for key, value in group.items():
            numbers = value if isinstance(value, list | tuple) else [value]
            found = [float(n) for n in numbers if isinstance(n, int | float) and not isinstance(n, bool)]
            if found:
                out.setdefault(key, []).extend(found)
    return out


# ---- data


def order_facts(order: Order | StreamOrder, segment: Segment) -> list[Fact]:
    """Of the order of samples: its name and seed, and unless these say all, hashes of the first and the last epoch."""
    facts = [setting("the order of samples", order.name), setting("the seed of the order", order.seed)]
    if isinstance(order, StreamOrder) or order.is_named:
        return facts
    for epoch in sorted({segment.first_epoch, segment.first_epoch + max(1, segment.passes) - 1}):
        indices = order.indices(epoch)
        digest = hashlib.blake2b(indices.numpy().tobytes(), digest_size=4).hexdigest()
        facts.append(setting(f"the order of epoch {epoch}", f"{digest} ({len(indices)} indices)"))
    return facts


def sample_facts(dataset: Dataset[Any], seed: int, epoch: int, size: int, in_process: bool) -> list[Fact]:
    """Return facts about a few samples of `dataset`, augmented as in data epoch `epoch`. Of a stream, also about its shards.

    Each sample is loaded twice. If the two differ, it is not compared. `in_process`: load samples here. Otherwise, load them in
    another process, because a data set may open its files in the first process that loads. Random generators stay as they were. A
    sample that cannot be loaded is not compared; training reports it when it needs the sample.

    Raises UsageError if a stream cannot be opened at a position.
    """
    if isinstance(dataset, Stream):
        return _stream_facts(dataset, seed, epoch, in_process)
    indices = sorted({size * part // (_SAMPLES - 1) if part < _SAMPLES - 1 else size - 1 for part in range(_SAMPLES)})
    found = _some(samples_of(dataset, seed), epoch, [index for index in indices for _ in range(2)], in_process)
    return [one for one, other in zip(found[::2], found[1::2], strict=False) if one == other]


def _stream_facts(stream: Stream, seed: int, epoch: int, in_process: bool) -> list[Fact]:
    """Return facts about a stream: the samples of its shards, and a few samples, as `sample_facts` has them.

    Raises UsageError if `open` pays no attention to the position. A shard that is opened at its second sample must begin with the
    sample that comes second if it is opened at its start.
    """
    lengths = stream.lengths
    digest = hashlib.blake2b(str(lengths).encode(), digest_size=4).hexdigest()
    shards = setting("the shards", f"{len(lengths)} shards of {min(lengths)} to {max(lengths)} samples ({digest})")
    number = next((number for number, length in enumerate(lengths) if length > 1), None)
    if number is None:
        return [shards]
    first = stream.first(number)
    ends = [] if stream.reads_from_start else [len(stream) - 1] * 2
    # the last one of the first four comes from the shard that was opened for `first`, the first two from shards of their own
    found = _some(samples_of(stream, seed), epoch, [first + 1, first + 1, first, first + 1, *ends], in_process)
    if len(found) < 4:
        return [shards]
    if found[0] != found[1]:
        log.warning(
            "%s gives other samples when it is read again, so results depend on which worker reads what: draw random numbers "
            "from the global generators of torch, numpy or Python, which are seeded for each sample.", stream.kind,
        )  # fmt: skip
        return [shards]
    if found[0] != found[3]:
        raise UsageError(
            f"{stream.kind} cannot be opened at a position: {stream.name_of(number)} at position 1 does not begin with its "
            "second sample, so open(shard, position) must leave out the samples before position."
        )
    return [shards, found[2], found[3], *(found[4:5] if found[4:5] == found[5:6] else [])]


def _some(samples: Samples | StreamSamples, epoch: int, indices: Sequence[int], in_process: bool) -> list[Fact]:
    """Return facts about samples, as far as these can be loaded in a short time."""
    if not in_process and multiprocessing.get_start_method(allow_none=True) not in (None, "fork"):
        return []  # starting a process takes longer than the comparison is worth
    facts: list[Fact] = []
    began = time.monotonic()
    with _random_numbers_kept():
        try:
            keys = [(epoch, index) for index in indices]
            loaded = map(samples.__getitem__, keys) if in_process else _loaded_elsewhere(samples, keys)
            for index, sample in zip(indices, loaded, strict=False):
                facts.append(_fact(f"sample {index}", sample))
                if time.monotonic() > began + _SAMPLES_S:
                    break
        except Exception as error:
            log.debug("samples are not compared: %s", error)
    return facts


def _loaded_elsewhere(samples: Samples | StreamSamples, keys: Sequence[tuple[int, int]]) -> Iterator[Any]:
    return iter(DataLoader(samples, batch_size=None, sampler=keys, num_workers=1, collate_fn=_as_it_is))


def _as_it_is(sample: Any) -> Any:
    return sample


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Restore all random generators at the end of the context."""
    ours, numpys, pythons = torch.get_rng_state(), np.random.get_state(), random.getstate()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(ours)
        np.random.set_state(numpys)
        random.setstate(pythons)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)


# ---- values of any kind


def _fact(name: str, value: Any) -> Fact:
    """Return a fact about a value: the kinds of its parts, a hash of what must be equal, and numbers that may be rounded."""
    kinds: list[str] = []
    digest = hashlib.blake2b(digest_size=4)
    numbers: list[float] = []
    for leaf in _leaves(value):
        kinds.append(_look(leaf, digest, numbers))
    said = f"({', '.join(kinds[:6])}{', ...' if len(kinds) > 6 else ''}) {digest.hexdigest()}"
    return Fact(name, said, numbers[:MOST_NUMBERS], _WITHIN)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _look(leaf: Any, digest: Any, numbers: list[float]) -> str:
    """Add a leaf to the digest or the numbers, and return its kind."""
    if isinstance(leaf, torch.Tensor):
        for _, part in parts_of(leaf):
            _look_at_tensor(part.detach().cpu(), digest, numbers)
        return f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc":
        _look_at_tensor(torch.from_numpy(np.ascontiguousarray(leaf)), digest, numbers)
        return f"{leaf.dtype} {list(leaf.shape)}"
    if isinstance(leaf, float):
        numbers.append(leaf)
    elif hasattr(leaf, "__array_interface__"):  # an image
        return _look(np.asarray(leaf, dtype=np.float32), digest, numbers)
    elif isinstance(leaf, str | bytes | int | type(None)):
        digest.update(repr(leaf).encode())
    return type(leaf).__name__


def _look_at_tensor(tensor: torch.Tensor, digest: Any, numbers: list[float]) -> None:
    digest.update(str((tensor.dtype, list(tensor.shape))).encode())
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point():
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return
    flat = tensor.reshape(-1).double()
    finite = flat.isfinite()
    digest.update(finite.numpy().tobytes() if not finite.all() else b"")
    flat = torch.where(finite, flat, 0.0)
    places = torch.arange(len(flat), dtype=torch.float64) % 97 + 1  # the same values in another order give another sum
    sizes = flat.abs()
    found = [sizes.sum(), (sizes * places).sum(), (flat.clamp(min=0) * places.flip(0)).sum()]  # no terms cancel out
    numbers.extend(float(sum_) / max(len(flat), 1) for sum_ in found if math.isfinite(float(sum_)))
