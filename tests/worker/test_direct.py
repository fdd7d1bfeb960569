"""Gradients of linear layers, written where they are contributed from, have every bit of autograd's own."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from worker.replica import Replica
from worker.slots import Slot, Slots

Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 320)
        self.twice = nn.Linear(320, 320, bias=False)
        self.tied = nn.Linear(320, 320)
        self.tied.weight = self.twice.weight
        self.last = nn.Linear(320, 160)

    def forward(self, x: torch.Tensor, dims: int = 2) -> torch.Tensor:
        if dims == 3:
            x = x.reshape(4, -1, 24)
        h = torch.tanh(self.first(x))
        h = self.tied(self.twice(torch.tanh(self.twice(h))))
        return self.last(h)


def plain(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def three_dimensional(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x, 3).square().mean()


def penalised(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A gradient penalty: backward is differentiated."""
    x = x.clone().requires_grad_()
    loss = model(x).square().mean()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + slope.square().sum()


def looked_at(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Gradients are asked for that are nobody's contribution."""
    torch.autograd.grad(model(2 * x).sum(), list(model.parameters()))
    inputs = x.clone().requires_grad_()
    torch.autograd.grad(model(inputs).sum(), inputs)
    return plain(model, x)


def setting() -> tuple[nn.Module, Replica, Slots, Slot]:
    torch.manual_seed(3)
    model = Net()
    replica = Replica(model, {id(p): 0 for p in model.parameters()}, servers=2)
    slots = Slots(replica.layout, shared=True)
    replica.catch_gradients()
    slot = slots.take(lambda slot: False)
    replica.contribute_to(slot)
    return model, replica, slots, slot


def untouched() -> nn.Module:
    torch.manual_seed(3)
    return Net()


def flat(replica: Replica, sums: Any) -> torch.Tensor:
    return torch.cat([sums[chunk.id].values * sums[chunk.id].scale for chunk in replica.layout.chunks])


def expected(replica: Replica, model: nn.Module, samples: int) -> torch.Tensor:
    """The contribution gathered from the gradients of a model that has nothing of ours in it."""
    other = Replica(model, {id(p): 0 for p in model.parameters()}, servers=2)
    other.contribute_to(Slots(other.layout, shared=False).take(lambda slot: False))
    return flat(replica, other.gradient(samples))


@pytest.mark.parametrize("loss", [plain, three_dimensional, looked_at])
@pytest.mark.parametrize("calls", [1, 2])
def test_every_bit_is_autograds(loss: Loss, calls: int) -> None:
    model, replica, _, _ = setting()
    ours, theirs = model, untouched()
    x = torch.randn(12, 24)
    for _ in range(calls):
        loss(ours, x).backward()
        loss(theirs, x).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert torch.equal(flat(replica, replica.gradient(16)), expected(replica, theirs, 16))
    assert all(p.grad is None for p in model.parameters())


def test_a_gradient_of_a_gradient_is_autograds_to_rounding() -> None:
    model, replica, _, _ = setting()
    theirs = untouched()
    x = torch.randn(12, 24)
    for one in (model, theirs):
        penalised(one, x).backward()
    torch.testing.assert_close(flat(replica, replica.gradient(16)), expected(replica, theirs, 16), rtol=1e-5, atol=1e-6)


def test_large_gradients_are_where_they_are_contributed_from_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _replica, _, slot = setting()
    copied: list[tuple[int, ...]] = []
    real = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: copied.append(tuple(self.shape)) or real(self, other))
    plain(model, torch.randn(12, 24)).backward()
    assert (320, 24) not in copied and (160, 320) not in copied
    start, end = slot.memory.data_ptr(), slot.memory.data_ptr() + slot.memory.numel()
    assert start <= model.first.weight.grad.data_ptr() < end and start <= model.last.weight.grad.data_ptr() < end


def test_what_a_script_does_to_gradients_before_step_counts() -> None:
    model, replica, _, _ = setting()
    theirs = untouched()
    x = torch.randn(12, 24)
    for one in (model, theirs):
        plain(one, x).backward()
        nn.utils.clip_grad_norm_(one.parameters(), 1e-3)
        one.last.weight.grad = one.last.weight.grad * 3
        one.first.bias.grad = None
    assert torch.equal(flat(replica, replica.gradient(10)), expected(replica, theirs, 10))


def test_a_copy_and_a_saved_model_have_nothing_to_do_with_the_run() -> None:
    model, replica, _, slot = setting()
    before = slot.memory.clone()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        plain(other, torch.randn(12, 24)).backward()
        assert other.last.weight.grad is not None
    assert torch.equal(slot.memory, before)
    assert not any(part.present for part in replica.gradient(1).values())


def test_under_autocast_the_layers_are_torchs_own() -> None:
    model, replica, _, _ = setting()
    theirs = untouched()
    x = torch.randn(12, 24)
    for one in (model, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            y = one(x)
        assert y.dtype == torch.bfloat16
        y.float().square().mean().backward()
    assert torch.equal(flat(replica, replica.gradient(8)), expected(replica, theirs, 8))
