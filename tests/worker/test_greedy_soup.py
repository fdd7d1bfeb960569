"""Workers agree on whose replica is in a greedy merge, through a key-value store that is all they share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from roundtable.common.model.tensor_bytes import from_frame
from roundtable.common.runtime.errors import ClusterError
from roundtable.worker.client.context import WorkerContext
from roundtable.worker.client.kv_client import KvClient
from roundtable.worker.merge.averaging import greedy
from roundtable.worker.merge.greedy_soup import GreedySoup
from roundtable.worker.replica.replica import Replica


class Store:
    """The servers' side, for several clients in threads."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    def push(self, key: str, tensor: torch.Tensor, op: Literal["add", "set"] = "add") -> int:
        with self._lock:
            self.values[key] = self.values[key] + tensor if op == "add" and key in self.values else tensor.clone()
        return 0

    def pull(self, key: str, out: torch.Tensor) -> int:
        with self._lock:
            out.copy_(self.values[key])
        return 0

    def wait(self, timestamp: int) -> None:
        pass


def score(point: float, target: float) -> float:
    """Better the nearer it is, but for what rounding makes of a mean."""
    return -abs(round(point - target, 9))


class Worker:
    """A replica of one number, the better the nearer it is to `target`."""

    def __init__(self, index: int, count: int, point: float, target: float, store: Store, timeout: float = 60.0) -> None:
        self.point = self.now = point
        self._target = target
        self.logged: dict[str, float] = {}
        chunks = [SimpleNamespace(id=7, numel=1, dtype="float64", kind="param")]
        layout = SimpleNamespace(chunks=chunks)
        self.replica = cast(Replica, SimpleNamespace(layout=layout, load=self._load, began=dict, model=nn.Module()))
        self._store = cast(KvClient, store)
        self.context = cast(
            WorkerContext,
            SimpleNamespace(
                index=index,
                settings=SimpleNamespace(workers=count, progress_timeout=timeout),
                wait=lambda *args, **more: None,
            ),
        )

    def _load(self, frames: dict[int, Any]) -> None:
        self.now = float(from_frame(frames[7], "float64", 1, "chunk"))

    def weigh(self, evaluate: Callable[[], float] | None = None) -> int:
        values = {7: torch.tensor([self.point], dtype=torch.float64)}
        evaluate = evaluate or (lambda: score(self.now, self._target))
        is_chief = self.context.index == 0
        return GreedySoup(self.context, self._store, is_chief, self.replica, evaluate, self.logged.update, 0).weight(values)


@settings(max_examples=30)
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=5), st.integers(-20, 20))
def test_all_choose_as_one_who_had_all_the_replicas_would(points: list[int], target: int) -> None:
    store = Store()
    workers = [Worker(i, len(points), point, target, store) for i, point in enumerate(points)]
    with ThreadPoolExecutor(len(workers)) as threads:
        found = list(threads.map(Worker.weigh, workers))
    chosen = greedy(
        [score(point, target) for point in points], lambda numbers: score(sum(points[i] for i in numbers) / len(numbers), target)
    )
    assert found == [int(i in chosen) for i in range(len(points))]
    assert workers[0].logged["merged_parts"] == len(chosen)
    assert all(values.numel() == 1 for key, values in store.values.items() if "part" in key)


def test_a_replica_whose_score_is_no_number_is_left_out() -> None:
    store = Store()
    good, bad = Worker(0, 2, 1.0, 0.0, store), Worker(1, 2, float("nan"), 0.0, store)
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(Worker.weigh, [good, bad])) == [1, 0]


def test_whoever_is_waited_for_too_long_is_named() -> None:
    with pytest.raises(ClusterError, match=r"the weights of worker-1 and worker-2\.$"):
        Worker(0, 3, 1.0, 0.0, Store(), timeout=0.01).weigh()
    with pytest.raises(ClusterError, match=r"worker-0 to choose replicas\.$"):
        Worker(2, 3, 1.0, 0.0, Store(), timeout=0.01).weigh()
