"""Workers' facts on their schedule and data are equal if these are, and name the difference if they are not."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import Dataset

from roundtable.common.config.batch_plan import make_segment
from roundtable.common.config.worker_facts import Fact, FirstFacts, difference
from roundtable.common.protocol.messages.setup import Plan
from roundtable.worker import facts as alike
from roundtable.worker.optim.optimizer import Hypers

ROUNDS = 12


def differs(one: list[Fact], other: list[Fact]) -> str:
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(Plan(segment(), facts=other)), type=Plan)
    return difference(FirstFacts("worker-0 on here", one), sent.facts, "worker-1 on there")


def segment(epochs: int = 3) -> Any:
    return make_segment(before=None, samples=32, global_batch=8, micro_batch=4, epochs=epochs, round_limit=None)


def schedule(make: Callable[[Any], Any], per: Any = "round", momentum: float = 0.9) -> list[Fact]:
    optimizer = torch.optim.SGD([torch.zeros(1, 1, requires_grad=True)], lr=0.1, momentum=momentum)
    return alike.ScheduleFacts(Hypers(optimizer, make, per, lambda epoch: None)).of(segment())


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (lambda o: StepLR(o, 2, 0.5), lambda o: StepLR(o, 2, 0.9), "the schedule's gamma 0.9 where worker-0 on here has 0.5"),
        (lambda o: StepLR(o, 2), lambda o: LambdaLR(o, lambda n: 1.0), "the schedule LambdaLR where worker-0 on here has StepLR"),
        (
            lambda o: LambdaLR(o, lambda n: 0.9**n),
            lambda o: LambdaLR(o, lambda n: 0.8**n),
            "lr in round 1 0.08 where worker-0 on here has 0.09",
        ),
        (
            lambda o: LambdaLR(o, lambda n: 1.0),
            lambda o: LambdaLR(o, lambda n: 2.0 if n == 7 else 1.0),  # a round that is not told of by itself
            "lr in rounds 0 to 11, of which the mean is 0.108333 where worker-0 on here has 0.1",
        ),
        (lambda o: ReduceLROnPlateau(o), lambda o: ReduceLROnPlateau(o, patience=3), "the schedule's patience 3 where"),
    ],
)
def test_schedules_that_differ_are_told_by_what_differs(one: Any, other: Any, said: str) -> None:
    per = "epoch" if "Reduce" in type(one(torch.optim.SGD([torch.zeros(1)], lr=0.1))).__name__ else "round"
    first, second = schedule(one, per), schedule(other, per)
    assert differs(first, schedule(one, per)) == differs(second, schedule(other, per)) == ""
    assert f"worker-1 on there has {said}" in differs(first, second)


def test_a_schedule_that_cannot_be_stepped_any_further_is_told_as_far_as_it_goes() -> None:
    facts = schedule(lambda o: OneCycleLR(o, 0.1, total_steps=5))
    assert [fact.name for fact in facts if fact.name.startswith("lr in")] == [f"lr in round {n}" for n in (0, 1, 2, 4)]


class Images(Dataset[Any]):
    """Samples of many kinds; `augment` draws from three generators, which are seeded for each."""

    def __init__(self, size: int = 10, shift: int = 0, rounding: float = 0.0, augment: bool = False, wild: bool = False) -> None:
        self.size, self.shift, self.rounding, self.augment, self.wild = size, shift, rounding, augment, wild
        self.calls = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.calls += 1
        image = torch.full((3, 4), float(index + self.shift)) * (1 + self.rounding)
        if self.augment:
            image += torch.randn(3, 4) + random.random() + float(np.random.rand())
        if self.wild:
            image += self.calls
        return {"image": image, "label": index % 3, "text": f"number {index}", "more": [np.arange(3), None, b"x", 0.5]}


def samples(dataset: Dataset[Any], in_process: bool = True, seed: int = 0) -> list[Fact]:
    return alike.sample_facts(dataset, seed, 0, len(dataset), in_process)  # type: ignore[arg-type]


@pytest.mark.parametrize("in_process", [True, False])
def test_data_that_differs_is_told_by_the_first_sample_that_does(in_process: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alike, "_SAMPLES_S", float("inf"))  # however slow this machine is
    for augment in (False, True):
        known = samples(Images(augment=augment), in_process)
        assert [fact.name for fact in known] == ["sample 0", "sample 3", "sample 6", "sample 9"]
        assert differs(known, samples(Images(augment=augment), in_process)) == ""
        assert differs(known, samples(Images(augment=augment, rounding=1e-6), in_process)) == ""  # of another processor
        assert "worker-1 on there has sample 0 (" in differs(known, samples(Images(augment=augment, shift=1), in_process))
    assert differs(samples(Images()), samples(Images(20))) == ""  # its length is compared elsewhere


def test_samples_that_are_not_the_same_twice_are_not_compared_and_one_that_fails_is_told_of_when_it_is_needed() -> None:
    class Broken(Images):
        def __getitem__(self, index: int) -> dict[str, Any]:
            raise OSError("no such file")

    assert samples(Images(wild=True)) == [] and samples(Broken()) == []


def test_random_numbers_go_on_as_if_no_sample_had_been_loaded() -> None:
    def drawn() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    for generator in (torch.manual_seed, np.random.seed, random.seed):
        generator(5)
    expected = drawn()
    for generator in (torch.manual_seed, np.random.seed, random.seed):
        generator(5)
    samples(Images(augment=True))
    assert drawn() == expected


def test_an_order_of_values_and_places_of_numbers_that_are_none_are_compared() -> None:
    class One(Images):
        def __init__(self, values: list[float]) -> None:
            super().__init__(1)
            self.values = values

        def __getitem__(self, index: int) -> Any:
            return torch.tensor(self.values)

    known = samples(One([1.0, 2.0, 3.0, float("nan")]))
    assert differs(known, samples(One([1.0, 2.0, 3.0, float("nan")]))) == ""
    for other in ([1.0, 3.0, 2.0, float("nan")], [1.0, 2.0, float("nan"), 3.0], [1.0, 2.0, -3.0, float("nan")], [1.0, 2.0, 3.0]):
        assert "sample 0" in differs(known, samples(One(other)))
