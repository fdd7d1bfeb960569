"""Orders of samples are pure functions of (seed, epoch), also those that stand for torch's samplers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from roundtable.common.config.batch_plan import derive_seed, make_segment
from roundtable.common.config.worker_facts import FirstFacts, difference
from roundtable.common.runtime.errors import UsageError
from roundtable.worker import facts as alike
from roundtable.worker.data.orders import (
    Order,
    class_balanced_order,
    length_bucketed_order,
    order_by,
    shuffled,
    weighted_order,
)
from roundtable.worker.data.samplers import order_of_sampler

N = 20
DATA: Any = list(range(N))


def of(sampler: Any, seed: int = 3) -> Order:
    return order_of_sampler(sampler, seed, N, 0)


def epochs(order: Order) -> list[list[int]]:
    """The indices of three epochs, which are the same when they are asked for again in another order."""
    later = {epoch: order.indices(epoch).tolist() for epoch in (2, 0, 1)}
    assert [order.indices(epoch).tolist() for epoch in range(3)] == [later[epoch] for epoch in range(3)]
    assert all(len(indices) == order.places for indices in later.values())
    return [later[epoch] for epoch in range(3)]


def refusal(sampler: Any = None, order: Any = None) -> str:
    with pytest.raises(UsageError) as caught:
        of(sampler) if order is None else order_by(order, 0, N, 0)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    return str(caught.value)


def test_the_uniform_order_has_the_bits_that_it_always_had() -> None:
    for epoch, indices in enumerate(epochs(shuffled(N, True, 3))):
        generator = torch.Generator().manual_seed(derive_seed(3, "order", epoch))
        assert indices == torch.randperm(N, generator=generator).tolist()


def test_well_known_samplers_become_the_orders_that_they_stand_for() -> None:
    assert epochs(of(SequentialSampler(DATA))) == epochs(of(range(N))) == [list(range(N))] * 3
    assert epochs(of(DistributedSampler(DATA, 4, 1, shuffle=False))) == [list(range(N))] * 3
    uniform = epochs(shuffled(N, True, 3))
    assert epochs(of(RandomSampler(DATA))) == epochs(of(DistributedSampler(DATA, 4, 1))) == uniform
    assert all(sorted(indices) == DATA for indices in uniform) and uniform[0] != uniform[1]
    more = epochs(of(RandomSampler(DATA, num_samples=50)))
    assert all(set(Counter(indices).values()) == {2, 3} for indices in more)
    replaced = epochs(of(RandomSampler(DATA, replacement=True, num_samples=500)))
    assert all(set(indices) == set(DATA) and len(indices) == 500 for indices in replaced)
    chosen = [3, 5, 19, 7]
    assert all(sorted(indices) == sorted(chosen) for indices in epochs(of(SubsetRandomSampler(chosen))))


def test_weights_decide_how_often_a_sample_is_drawn() -> None:
    weights = [0.0] * 10 + [1.0] * 9 + [11.0]
    for order in (of(WeightedRandomSampler(weights, 4000)), order_by(weighted_order(weights, 4000), 3, N, 0)):
        first, second, _ = epochs(order)
        counts = Counter(first)
        assert first != second and set(counts) == set(range(10, 20))
        assert 0.5 < counts[19] / 4000 < 0.6  # 11 of 20
    once = epochs(order_by(weighted_order(weights, 10, replacement=False), 3, N, 0))
    assert all(sorted(indices) == list(range(10, 20)) for indices in once)


@pytest.mark.parametrize("labels", [[0] * 12 + [1] * 5 + [7] * 3, ["a"] * 12 + ["b"] * 5 + ["c"] * 3])
def test_a_class_balanced_epoch_has_each_class_equally_often_and_no_sample_much_more_than_another(labels: list[Any]) -> None:
    for samples in (None, 100, 2):
        order = order_by(class_balanced_order(labels, samples), 3, N, 0)
        assert order.places == (samples or N)
        for indices in epochs(order):
            per_class = Counter({label: 0 for label in labels}) + Counter(labels[index] for index in indices)
            assert max(per_class.values()) - min(per_class.values() if len(per_class) == 3 else [0]) <= 1
            for label in per_class:
                counts = [indices.count(index) for index in range(N) if labels[index] == label]
                assert max(counts) - min(counts) <= 1


def test_micro_batches_of_a_length_bucketed_epoch_have_samples_of_similar_length_and_every_sample_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 1003)
    order = order_by(length_bucketed_order(lengths.tolist(), 8), 3, 1003, 0)
    first, second, _ = epochs(order)
    assert sorted(first) == sorted(second) == list(range(1003)) and first != second
    spread = [np.ptp(lengths[first[at : at + 8]]) for at in range(0, 1000, 8)]
    assert np.mean(spread) < 30  # of 1000; shuffled, it would be 780
    starts = [lengths[first[at]] for at in range(0, 1000, 8)]
    assert starts != sorted(starts)


def test_a_generator_or_a_seed_of_a_sampler_chooses_another_order() -> None:
    plain = epochs(of(RandomSampler(DATA)))
    seeded = of(RandomSampler(DATA, generator=torch.Generator().manual_seed(5)))
    assert epochs(seeded) == epochs(of(DistributedSampler(DATA, 2, 0, seed=5))) == epochs(shuffled(N, True, 8)) != plain


class Own(Sampler[int]):
    def __iter__(self) -> Any:
        return iter(DATA)

    def __len__(self) -> int:
        return N


class Mine(RandomSampler):
    def __iter__(self) -> Any:
        return iter(DATA)


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        (Own(), "Own may draw other samples in each worker, so batches() cannot use it: pass order=lambda seed, epoch: indices"),
        (Mine(DATA), "Mine may draw other samples in each worker"),
        (iter(DATA), "list_iterator may draw other samples"),
        (RandomSampler(DATA[:5]), "RandomSampler is over 5 samples but the data set has 20: make it for this data set."),
        ([0, 20], "the order 'list' has index 20, but the data set has 20 samples: indices go from 0 to 19."),
    ],
)
def test_a_sampler_that_workers_cannot_share_is_refused_in_a_sentence(sampler: Any, said: str) -> None:
    assert refusal(sampler).startswith(said)


def unsteady(seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(N)


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (unsteady, "the order 'unsteady' gives other indices each time for one epoch: draw them from a generator seeded by"),
        (lambda seed, epoch: [-1], "the order '<lambda>' has index -1"),
        (lambda seed, epoch: [0.5], "the order '<lambda>' gives list, not a list of indices: it must return whole numbers."),
        (lambda seed, epoch: None, "the order '<lambda>' gives NoneType, not a list of indices"),
        (lambda seed, epoch: [], "the order '<lambda>' gives list, not a list of indices"),
        ("sorted", "order is 'sorted', not a function: pass order=lambda seed, epoch: indices."),
    ],
)
def test_an_order_that_is_no_pure_function_or_no_indices_is_refused(order: Any, said: str) -> None:
    assert refusal(order=order).startswith(said)


def test_a_script_may_give_lists_ranges_arrays_and_tensors_but_as_many_in_every_epoch() -> None:
    for make in (list, tuple, lambda found: found, np.array, torch.tensor):
        assert epochs(order_by(lambda seed, epoch, make=make: make(range(N)), 0, N, 0)) == [DATA] * 3  # type: ignore[misc]
    growing = order_by(lambda seed, epoch: range(5 + epoch), 0, N, 0)
    with pytest.raises(UsageError, match="has 6 samples in epoch 1 but 5 before: every epoch must have as many"):
        growing.indices(1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: weighted_order([1.0, -1.0]),
        lambda: weighted_order([0.0, 0.0]),
        lambda: weighted_order([]),
        lambda: weighted_order([1.0, float("nan")]),
        lambda: weighted_order([1.0, 0.0], 2, replacement=False),
        lambda: class_balanced_order([]),
        lambda: length_bucketed_order([], 4),
        lambda: length_bucketed_order([3, 4], 0),
    ],
)
def test_orders_without_a_meaning_are_refused(make: Any) -> None:
    with pytest.raises(UsageError, match=r"\.$"):
        make()


def differs(one: Order, other: Order) -> str:
    plan = make_segment(before=None, samples=N, global_batch=8, micro_batch=4, epochs=3, round_limit=None)
    known = FirstFacts("worker-0 on a", alike.order_facts(one, plan))
    return difference(known, alike.order_facts(other, plan), "worker-1 on b")


def test_workers_whose_orders_differ_are_told_by_what_differs() -> None:
    weights = [1.0] * N
    orders = [shuffled(N, True), shuffled(N, False), of(WeightedRandomSampler(weights, N)), of(range(N))]
    assert [differs(order, order) for order in orders] == [""] * 4
    assert differs(orders[0], orders[1]).startswith(
        "worker-1 on b has the order of samples sequential where worker-0 on a has uniform"
    )
    assert "the seed of the order 7 where worker-0 on a has 0" in differs(orders[0], shuffled(N, True, 7))
    other = of(WeightedRandomSampler([*weights[1:], 9.0], N))
    assert "has the order of epoch 0 " in differs(orders[2], other) and "(20 indices) where" in differs(orders[2], other)
    late = [order_by(lambda seed, epoch, at=at: np.roll(DATA, at * (epoch == 2)), 0, N, 0) for at in (0, 1)]  # type: ignore[misc]
    assert "has the order of epoch 2 " in differs(*late)
