"""Servers' layers on another device: everything gets there and back, and nothing is computed half here and half there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import DEVICE, Elsewhere, There
from fake_sharded_link import AtOnce, sharded
from torch import nn

from roundtable.common.model.sparse_rows import cut
from roundtable.common.protocol.messages.setup import Update
from roundtable.common.protocol.messages.sharded import LayerPush
from roundtable.common.runtime.devices import find_device
from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage import tensor_file
from roundtable.common.storage.tensor_file import TensorFiles
from roundtable.ps.sharded.contributions import replicated, tensors_of
from roundtable.worker.layers.margin_losses import CosFace
from roundtable.worker.layers.sharded_linear import ColumnParallelLinear, ShardedLinear, sharded_cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")

#: Features so many that two servers have several tiles of one size, or so few that each has one tile of what takes part.
WIDE, NARROW = 1024, 32
DIM, CLASSES, BATCH = 10, 1024, 4
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adagrad": {"lr": 0.1, "initial_accumulator_value": 0.2},
    "Adam": {"lr": 0.01, "eps": 1e-3},
}


class Net(nn.Module):
    def __init__(self, bias: bool, sample_rate: float, width: int = WIDE) -> None:
        super().__init__()
        self.hidden = ColumnParallelLinear(DIM, width)
        self.head = ShardedLinear(width, CLASSES, bias, sample_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.hidden(x).relu())
        return out


def update_of(optimizer: str) -> Update:
    made = getattr(torch.optim, optimizer)([torch.zeros(1)], **OPTIMIZERS[optimizer])
    return Update(optimizer, [{k: v for k, v in made.param_groups[0].items() if k != "params"}])


def trained(device: torch.device, optimizer: str, rounds: int, net: dict[str, Any], how: dict[str, Any]) -> tuple[Any, AtOnce]:
    """After some rounds: losses, best classes and rows; and the servers."""
    model = Net(**net)
    shards, link = sharded(model, 2, update_of(optimizer), device=device)
    found: list[torch.Tensor] = []
    for number in range(rounds):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(BATCH, DIM, generator=generator, requires_grad=True)
        y = torch.randint(CLASSES, (BATCH,), generator=generator)
        loss = sharded_cross_entropy(model(x), y, **how)
        loss.backward()
        assert x.grad is not None
        found += [loss.detach(), x.grad]
        push = LayerPush(link.round, 0, 1, BATCH, [])
        shards.push(push, shards.contribution(BATCH), {})
        norms = torch.tensor([norm for _, _, norm in link.norms(BATCH)])
        link.close(BATCH, factor=torch.tensor(0.5))
        found += [norms, *model.head.topk(model.hidden(x.detach()), 3)]
        shards.forget()
    return [*found, link.rows(0), link.rows(1)], link


@pytest.mark.parametrize(
    ("optimizer", "net", "how"),
    [
        ("SGD", {"bias": True, "sample_rate": 1.0}, {"label_smoothing": 0.1}),
        ("Adagrad", {"bias": False, "sample_rate": 1.0}, {"margin": CosFace(4.0, 0.2)}),
        ("Adam", {"bias": False, "sample_rate": 0.5, "width": NARROW}, {}),
    ],
)
def test_layers_on_another_device_learn_the_same(optimizer: str, net: dict[str, Any], how: dict[str, Any]) -> None:
    expected, _ = trained(torch.device("cpu"), optimizer, 3, net, how)
    with Elsewhere():
        found, link = trained(DEVICE, optimizer, 3, net, how)
        for server in link.servers:
            for one in server._layers:
                assert isinstance(one._values, There) and all(isinstance(state, There) for state in one._state.values())
    assert all(type(tensor) is torch.Tensor for tensor in found)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def saved(servers: Sequence[Any], folder: Path) -> TensorFiles:
    """A checkpoint of them, after the last round."""
    for number, server in enumerate(servers):
        server.finish_updates()
        tensor_file.write(folder / f"{number}.safetensors", list(server.state()), {})
    return TensorFiles(folder / f"{number}.safetensors" for number in range(len(servers)))


def test_checkpoints_are_those_of_the_cpu_and_go_on_on_either(tmp_path: Path) -> None:
    net: dict[str, Any] = {"bias": True, "sample_rate": 1.0}
    for name in ("here", "there", "back"):
        (tmp_path / name).mkdir()
    _, here = trained(torch.device("cpu"), "Adam", 2, net, {})
    expected = saved(here.servers, tmp_path / "here")
    with Elsewhere():
        _, there = trained(DEVICE, "Adam", 2, net, {})
        found = saved(there.servers, tmp_path / "there")
        _, other = sharded(Net(**net), 2, update_of("Adam"), device=DEVICE)
        for server in other.servers:
            server.restore(found, 2, 2)
        back = saved(other.servers, tmp_path / "back")
    assert set(expected) == set(found) == set(back)
    assert all(torch.equal(expected[name], found[name]) and torch.equal(expected[name], back[name]) for name in expected)


def test_copies_on_other_servers_may_be_on_another_device(tmp_path: Path) -> None:
    net: dict[str, Any] = {"bias": True, "sample_rate": 1.0}
    model = Net(**net)
    shards, link = sharded(model, 2, update_of("SGD"))
    x, y = torch.randn(BATCH, DIM), torch.randint(CLASSES, (BATCH,))
    with Elsewhere():
        _, copies = sharded(Net(**net), 2, update_of("SGD"), device=DEVICE)
        for part in copies.servers[0].parts():
            assert type(part.values) is torch.Tensor
        sharded_cross_entropy(model(x), y).backward()
        shards.push(LayerPush(0, 0, 1, BATCH, []), shards.contribution(BATCH), {})
        for number, copy in enumerate(copies.servers):
            counted = link._parts(number)
            told = replicated(0, counted, BATCH, [], None)
            frames = [frame for tensor in tensors_of(counted) for frame in cut(tensor)]
            copy.close(copy.received(told, frames, "a copy"), BATCH, [])
        link.close(BATCH)
        assert torch.equal(link.rows(1), copies.rows(1)) and torch.equal(link.rows(0), copies.rows(0))


def test_the_pretence_finds_operands_that_are_apart() -> None:
    with Elsewhere(), pytest.raises(AssertionError, match="here and there"):
        torch.ones(3, device=DEVICE) + torch.ones(3)


@pytest.mark.parametrize("name", ["abacus", "cuda:98", ""])
def test_a_device_that_is_not_here_is_named(name: str) -> None:
    with pytest.raises(UsageError, match=f"--device: device '{name}' is not available here"):
        find_device(name, "--device")
