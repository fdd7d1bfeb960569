"""`run.batches` with a DataLoader, with a data set and the same arguments, and with data that it cannot use."""

from __future__ import annotations

import itertools
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.data.arguments import Data, resolve

DATA = TensorDataset(torch.arange(20))


def own_collate(samples: list[Any]) -> list[Any]:
    return samples


def own_init(number: int) -> None:
    raise AssertionError("nobody loads here")


def data(dataset: Any = DATA, **arguments: Any) -> Data:
    return resolve(dataset, arguments, 3, 0)  # type: ignore[arg-type]


def indices(of: Data) -> list[int]:
    return list(of.order.indices(0).tolist())


def refusal(dataset: Any = DATA, **arguments: Any) -> str:
    with pytest.raises(UsageError) as caught:
        data(dataset, **arguments)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_loader_gives_its_data_set_sizes_order_and_processes() -> None:
    loader = DataLoader(
        DATA, batch_size=4, drop_last=True, num_workers=2, collate_fn=own_collate, pin_memory=True, prefetch_factor=5,
        persistent_workers=True, worker_init_fn=own_init, timeout=7.0, multiprocessing_context="spawn",
    )  # fmt: skip
    found = data(loader)
    assert (found.dataset, found.samples, found.micro_batch, found.global_batch) == (DATA, 20, 4, None)
    assert (found.drop_last, found.collate_fn, found.pin_memory) == (True, own_collate, True)
    context = found.processes["multiprocessing_context"]
    assert context.get_start_method() == "spawn" and found.processes == {
        "num_workers": 2, "prefetch_factor": 5, "persistent_workers": True, "worker_init_fn": own_init, "timeout": 7.0,
        "multiprocessing_context": context,
    }  # fmt: skip
    assert indices(found) == list(range(20))


def test_a_loader_that_says_nothing_is_as_a_data_set_that_is_not_shuffled() -> None:
    found, plain = data(DataLoader(DATA)), data(shuffle=False, micro_batch=1, drop_last=False)
    assert indices(found) == indices(plain) and found.order.name == plain.order.name == "sequential"
    assert (found.collate_fn, found.pin_memory, found.processes) == (plain.collate_fn, plain.pin_memory, plain.processes)
    assert found.pins(torch.device("cuda")) and not found.pins(torch.device("cpu"))
    assert not data(pin_memory=False).pins(torch.device("cuda"))


def test_arguments_take_the_place_of_a_loaders_own() -> None:
    loader = DataLoader(DATA, batch_size=16, shuffle=True, num_workers=2)
    assert indices(data(loader)) == indices(data()) == indices(data(DataLoader(DATA, sampler=RandomSampler(DATA))))
    found = data(loader, micro_batch=4, global_batch=16, shuffle=False, num_workers=0)
    assert (found.micro_batch, found.global_batch, found.processes) == (4, 16, {}) and indices(found) == list(range(20))
    assert data(loader, prefetch_factor=9).processes["prefetch_factor"] == 9
    for name, value in {"sampler": [3, 1], "order": lambda seed, epoch: [3, 1]}.items():
        assert indices(data(loader, **{name: value})) == [3, 1]


def test_a_batch_sampler_of_a_known_sampler_gives_sizes_and_order() -> None:
    weighted = WeightedRandomSampler([1.0] * 19 + [100.0], 50)
    found = data(DataLoader(DATA, batch_sampler=BatchSampler(weighted, 5, drop_last=True)))
    assert (found.micro_batch, found.drop_last, found.order.places) == (5, True, 50)
    assert indices(found) == indices(data(sampler=weighted)) and indices(found).count(19) > 25
    direct = data(DataLoader(DATA, batch_size=3), batch_sampler=BatchSampler(SequentialSampler(DATA), 4, drop_last=False))
    assert (direct.micro_batch, direct.drop_last) == (4, False)


def test_a_generator_adds_its_seed() -> None:
    seeded = data(DataLoader(DATA, shuffle=True, generator=torch.Generator().manual_seed(5)))
    assert indices(seeded) == indices(data(generator=torch.Generator().manual_seed(5))) == indices(resolve(DATA, {}, 8, 0))
    told: list[int] = []
    data(order=lambda seed, epoch: told.append(seed) or [0], generator=torch.Generator().manual_seed(5))  # type: ignore[func-returns-value]
    assert set(told) == {8}


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter([1])

    def __len__(self) -> int:
        return 1


class Unending(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return itertools.count()


class Unnumbered(Dataset[int]):
    def __len__(self) -> int:
        return 3


class Table:
    iloc = None

    def __len__(self) -> int:
        return 3

    def __getitem__(self, column: str) -> list[int]:
        return [1, 2, 3]


class Endless(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


class OwnLoader(DataLoader[Any]):
    def __iter__(self) -> Any:
        return iter(range(3))


class OwnBatches(Sampler[Any]):
    def __init__(self) -> None:
        """Batches of another size each."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0], [1, 2]])


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (
            Unending(),
            "Unending has no length, so nobody knows when an epoch ends: pass roundtable.stream_of(dataset, samples=...)",
        ),
        (DataLoader(Unending()), "Unending has no length"),
        ((number for number in [1]), "generator can be read only once, but any worker may have to read any sample: pass an Iter"),
        (Endless(), "Endless has no length: batches() needs a map-style data set (__len__ and __getitem__), so that any worker"),
        (Unnumbered(), "Unnumbered has no samples by number: batches() needs"),
        ({1, 2}, "set has no samples by number"),
        ("a text", "str has no samples by number"),
        (3, "int has no length"),
        (TensorDataset, "type has no"),
        ({"train": DATA, "test": DATA}, "dict has 'train', 'test' instead of numbered samples: pass the data set under one key."),
        (Table(), "Table is a table of columns: batches() needs"),
        (TensorDataset(torch.zeros(0)), "TensorDataset has no samples."),
        (
            DataLoader(DATA, batch_size=None),
            "DataLoader has batch_size=None, so its samples are not batched: give it a batch_size",
        ),
        (OwnLoader(DATA), "OwnLoader yields batches in a way of its own, which batches() would leave out: pass its data set"),
        (
            DataLoader(DATA, batch_sampler=OwnBatches()),
            "OwnBatches makes batches of its own, which batches() cannot use: pass order=",
        ),
    ],
)
def test_data_that_workers_cannot_share_is_refused_in_a_sentence(dataset: Any, said: str) -> None:
    assert refusal(dataset).startswith(said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sampler": [1], "shuffle": True}, "batches() has both sampler and shuffle=True, which each say the order of samples"),
        ({"order": print, "sampler": [1]}, "batches() has both order and sampler"),
        ({"epochs": 0}, "epochs is 0: it must be a whole number of at least 1."),
        ({"min_micro_batch": 1.5}, "min_micro_batch is 1.5: it must be a whole number"),
        ({"shuffle_window": 2}, "shuffle_window is for streams, but TensorDataset is map-style: leave it out."),
        ({"num_workers": -1}, "num_workers is -1: it must be at least 0."),
        ({"shufle": True}, "batches() has no argument 'shufle': pass one that its documentation names."),
        (
            {"batch_sampler": BatchSampler(SequentialSampler(DATA), 4, False), "micro_batch": 8},
            "batch_sampler has batches of 4 but micro_batch is 8: leave out one of them.",
        ),
    ],
)
def test_arguments_that_do_not_go_together_are_refused_in_a_sentence(arguments: dict[str, Any], said: str) -> None:
    assert refusal(**arguments).startswith(said)


class Encoding(UserDict[str, torch.Tensor]):
    """Moves itself, as the BatchEncoding of transformers does."""

    def to(self, device: Any) -> Encoding:
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


def test_an_iterable_data_set_with_a_length_is_a_stream_of_one_shard() -> None:
    found = data(Stream(), shuffle_window=1)
    assert (found.samples, found.order.places, found.order.name) == (1, 1, "shuffled shards of 1, window 1")
    loaded = data(DataLoader(Stream(), batch_size=4, num_workers=2, drop_last=True, collate_fn=own_collate))
    assert (loaded.micro_batch, loaded.drop_last, loaded.collate_fn) == (4, True, own_collate)
    assert loaded.processes["num_workers"] == 2 and loaded.order.name == "shards of 1, window 1"
    assert data(DataLoader(Stream()), shuffle=True, shuffle_window=9).order.name == "shuffled shards of 1, window 9"
    for argument in ({"order": print}, {"sampler": [0]}, {"batch_sampler": BatchSampler([0], 1, False)}):
        assert refusal(Stream(), **argument).startswith("Stream is a stream, whose samples come by shards: pass shuffle=")


def test_an_iterable_data_set_with_samples_by_number_is_map_style() -> None:
    class Both(Stream):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> int:
            return index

    assert (data(Both()).samples, data(DataLoader(Both())).order.name) == (3, "sequential")


def test_an_object_that_moves_itself_counts_as_a_sample() -> None:
    assert data([Encoding(x=torch.ones(2))]).samples == 1
