"""A micro-batch is the same whoever loads it, when, and by however many processes."""

from __future__ import annotations

import multiprocessing
import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from roundtable.common.config.batch_plan import Segment, Task, derive_seed, make_segment
from roundtable.worker.data.arguments import BatchArguments, resolve
from roundtable.worker.data.loader import Loader, Processes

SEED = 11


class Augmented(Dataset[Any]):
    """Samples that are dicts with random numbers of all three generators in them."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, "torch": torch.rand(2), "numpy": np.random.rand(), "python": random.random(), "name": f"#{index}"}


def mixed(samples: list[dict[str, Any]]) -> tuple[torch.Tensor, list[str], float]:
    """A collate function of the user's own, with random numbers in it."""
    weights = torch.stack([sample["torch"] for sample in samples])
    return weights[torch.randperm(len(samples))], [sample["name"] for sample in samples], random.random()


def segment(**changes: Any) -> Segment:
    plan: dict[str, Any] = {"before": None, "samples": 23, "global_batch": 10, "micro_batch": 4, "epochs": 2, "round_limit": None}
    return make_segment(**{**plan, **changes})


def loader(plan: Segment, tasks: list[Task], dataset: Any = None, **arguments: Any) -> Loader:
    """A loader that expects to be given `tasks`."""
    data = resolve(dataset or Augmented(), BatchArguments(**arguments), SEED, plan.first_epoch)
    processes = Processes(data, SEED, torch.device("cpu")) if data.processes else None
    return Loader(data, plan, SEED, forecast=lambda: iter(tasks), processes=processes)


def tasks_of(plan: Segment) -> list[Task]:
    return [Task(r, k) for r in range(plan.first_round, plan.end) for k in range(plan.round(r).micro_batches)]


def plain(batch: Any) -> Any:
    """A batch as something that can be compared."""
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [plain(value) for value in batch]
    return batch.tolist() if isinstance(batch, torch.Tensor) else batch


@pytest.mark.parametrize("collate", [None, mixed], ids=["default", "own"])
def test_two_loading_processes_give_the_bits_of_none_also_for_what_was_given_away_or_taken_over(collate: Any) -> None:
    plan = segment()
    tasks = tasks_of(plan)
    expected = {task: plain(loader(plan, [], collate_fn=collate).load(task)) for task in tasks}
    assert len({str(batch) for batch in expected.values()}) == len(tasks) == 14
    mine = tasks[::2]
    given_away, taken_over = mine[3], tasks[5]
    ahead = loader(plan, mine, num_workers=2, collate_fn=collate)
    todo = sorted({*mine, taken_over} - {given_away}, key=lambda task: (task.round, task.k))
    assert {task: plain(ahead.load(task)) for task in todo} == {task: expected[task] for task in todo}
    processes = multiprocessing.active_children()
    assert len(processes) == 2
    ahead.close()
    assert [process.exitcode for process in processes] == [0, 0]  # not ended by a signal after a time-out


def test_a_sample_is_augmented_by_seed_epoch_and_sample_alone() -> None:
    plan = segment(micro_batch=5)
    batches = [(plan.round(task.round).epoch, loader(plan, []).load(task)) for task in tasks_of(plan)]
    seen: dict[int, list[int]] = {0: [], 1: []}
    for epoch, batch in batches:
        seen[epoch] += batch["index"].tolist()
        for place, index in enumerate(batch["index"].tolist()):
            torch.manual_seed(derive_seed(SEED, "sample", epoch, index))
            random.seed(derive_seed(SEED, "sample", epoch, index))
            assert torch.equal(batch["torch"][place], torch.rand(2)) and batch["python"][place] == random.random()
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(23)) and seen[0] != seen[1]


def test_a_second_call_of_batches_goes_on_with_the_epochs_of_the_first() -> None:
    whole = segment(epochs=2)
    first = segment(epochs=1)
    second = segment(before=first, epochs=1)
    parts = [*(loader(first, []).load(t) for t in tasks_of(first)), *(loader(second, []).load(t) for t in tasks_of(second))]
    assert plain(parts) == plain([loader(whole, []).load(task) for task in tasks_of(whole)])


def test_unshuffled_samples_come_in_the_datasets_order_as_tuples_if_they_are() -> None:
    data = TensorDataset(torch.arange(9), torch.arange(9) * 2)
    plan = segment(samples=9, epochs=1)
    x, y = zip(*(loader(plan, [], dataset=data, shuffle=False).load(task) for task in tasks_of(plan)), strict=True)
    assert [len(part) for part in x] == [4, 4, 1]
    assert torch.cat(x).tolist() == list(range(9)) and torch.cat(y).tolist() == list(range(0, 18, 2))


def test_a_dataset_smaller_than_a_micro_batch_is_one_short_micro_batch() -> None:
    plan = segment(samples=3, epochs=1)
    (task,) = tasks_of(plan)
    data = TensorDataset(torch.arange(3))
    assert loader(plan, [], dataset=data, shuffle=False).load(task)[0].tolist() == [0, 1, 2]


class Numbered(Dataset[Any]):
    """Samples that say which process has loaded them."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, os.getpid()


def test_processes_that_are_kept_load_the_next_loop_too_also_after_one_that_was_left_early() -> None:
    first = segment(samples=8, epochs=1)
    data = resolve(Numbered(), BatchArguments(num_workers=1, persistent_workers=True, shuffle=False, prefetch_factor=3), SEED, 0)
    kept = Processes(data, SEED, torch.device("cpu"))
    seen: list[list[int]] = []
    pids: set[int] = set()
    for plan, loads in ((first, 2), (segment(samples=8, before=first, epochs=2), 1), (segment(samples=8, epochs=1), 2)):
        tasks = tasks_of(plan)
        mine = Loader(data, plan, SEED, forecast=lambda tasks=tasks: iter(tasks), processes=kept)  # type: ignore[misc]
        for task in tasks[:loads]:
            indices, loaded_by = mine.load(task)
            seen.append(indices.tolist())
            pids |= set(loaded_by.tolist())
        mine.close()
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(pids) == 1 and os.getpid() not in pids
    (process,) = multiprocessing.active_children()
    del kept, mine
    process.join(10)
    assert process.exitcode == 0


def test_batches_of_a_device_are_there() -> None:
    plan = segment(samples=8, epochs=1)
    data = resolve(Numbered(), BatchArguments(), SEED, 0)
    batch = Loader(data, plan, SEED, forecast=lambda: iter([]), device=torch.device("meta")).load(Task(0, 0))
    assert [part.device.type for part in batch] == ["meta", "meta"]
