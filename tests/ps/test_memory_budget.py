"""Layers that are too large for the servers' machines are refused, with the number of servers that could have them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from roundtable.common.model.layout import Layout, make_layout
from roundtable.common.protocol.messages.setup import Update
from roundtable.common.protocol.model_spec import ShardedLayerSpec, TableSpec, TensorSpec
from roundtable.common.runtime.errors import WireError
from roundtable.ps.params.memory_budget import check_memory

CPU = torch.device("cpu")
#: Of which 1 GiB is 2 ** 22 rows of 64 numbers.
DIM = 64
SGD, MOMENTUM, ADAM = (
    Update("SGD", [{"lr": 0.1}]), Update("SGD", [{"lr": 0.1, "momentum": 0.9}]), Update("Adam", [{"lr": 0.1}]),
)  # fmt: skip


@pytest.fixture(autouse=True)
def four_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 1 << 20, "SC_PAGE_SIZE": 1 << 12}[name])


def layout(gib: int, servers: int = 2, dense: int = 1) -> Layout:
    sharded_layers = [ShardedLayerSpec("head.weight", gib << 22, DIM, 0, 0.1)]
    return make_layout([TensorSpec("body.weight", [dense], "float32", 0)], servers, (), sharded_layers)


@pytest.mark.parametrize(
    ("gib", "update", "device", "replicas"),
    [
        (7, SGD, "cpu", 0),
        (3, MOMENTUM, "cpu", 0),
        (2, ADAM, "cpu", 0),
        (3, SGD, "cpu", 1),
        (99, SGD, "meta", 0),
        (7, SGD, "meta", 1),
    ],
)
def test_what_fits_is_taken(gib: int, update: Update, device: str, replicas: int) -> None:
    for server in (0, 1):
        check_memory(layout(gib), server, update, torch.device(device), replicas)


@pytest.mark.parametrize(
    ("gib", "update", "device", "replicas", "here", "least"),
    [
        (10, SGD, "cpu", 0, 5, 3),
        (10, MOMENTUM, "cpu", 0, 10, 5),
        (10, ADAM, "cpu", 0, 15, 8),
        (10, SGD, "cpu", 1, 10, 5),
        (10, ADAM, "cpu", 1, 30, 15),
        (10, SGD, "meta", 1, 5, 3),
    ],
)
def test_what_does_not_fit_is_refused(gib: int, update: Update, device: str, replicas: int, here: int, least: int) -> None:
    words = f"^'head.weight' takes {here}.0 GiB .* each of 2 servers, .* has 4.0: use at least {least} servers on machines of"
    with pytest.raises(WireError, match=words):
        check_memory(layout(gib), 0, update, torch.device(device), replicas)
    check_memory(layout(gib, least + 1), 0, update, torch.device(device), replicas)


def test_chunks_take_room_from_layers_and_tables_of_rows_do_not() -> None:
    dense = 3 << 28  # 3 GiB, of which each server has half, as weights and as a sum
    with pytest.raises(WireError, match=r"'head.weight' takes 2.0 GiB .* at least 3 servers"):
        check_memory(layout(4, dense=dense), 0, SGD, CPU, 0)
    check_memory(make_layout([], 1, [TableSpec("items.weight", 99 << 22, DIM, 0, 0.1)]), 0, ADAM, CPU, 0)
    with pytest.raises(WireError, match="the model takes 6 GiB on this server, whose machine has 4"):
        check_memory(layout(1, dense=2 * dense), 0, SGD, CPU, 0)


def test_all_layers_are_named() -> None:
    specs: list[Any] = [
        ShardedLayerSpec(name, 5 << 22, DIM, 0, 0.1, hidden=name == "fc.weight") for name in ("fc.weight", "head.weight")
    ]
    with pytest.raises(
        WireError, match=r"'fc.weight' and 'head.weight' take 10.0 GiB .* each of 1 server, .* at least 3 servers"
    ):
        check_memory(make_layout([], 1, (), specs), 0, SGD, CPU, 0)
