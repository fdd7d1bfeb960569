"""Gradients added in the shared gradient buffer have the bits of gradients added afterwards, whatever the script does."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from roundtable.common.model.partial_sum import Sum, adder
from roundtable.worker.replica.gradient_buffers import GradientBuffers
from roundtable.worker.replica.replica import Replica

SAMPLES = 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(320, 480)
        self.norm = nn.BatchNorm1d(480)
        self.twice = nn.Linear(480, 480, bias=False)
        self.tied = nn.Linear(480, 480)
        self.tied.weight = self.twice.weight
        self.last = nn.Linear(480, 320)
        self.unused = nn.Linear(320, 320)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.norm(self.first(x)))
        h = torch.tanh(self.twice(torch.tanh(self.tied(self.twice(h)))))
        return self.last(h)


Script = Callable[[Net, torch.Tensor], Any]


def plain(model: Net, x: torch.Tensor) -> None:
    model(x).square().mean().backward()


def twice(model: Net, x: torch.Tensor) -> None:
    plain(model, x)
    plain(model, 2 * x)


def penalised(model: Net, x: torch.Tensor) -> None:
    (model(x).square().mean() + 1e-3 * sum(p.square().sum() for p in model.parameters())).backward()


def clipped(model: Net, x: torch.Tensor) -> None:
    plain(model, x)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def changed(model: Net, x: torch.Tensor) -> None:
    plain(model, x)
    model.last.weight.grad = model.last.weight.grad * 3
    model.first.weight.grad.mul_(0.5)
    model.first.bias.grad = None


def zeroed(model: Net, x: torch.Tensor) -> None:
    plain(model, x)
    model.zero_grad()
    plain(model, 3 * x)


def overwritten_input(model: Net, x: torch.Tensor) -> None:
    x = x.clone()
    plain(model, x)
    x.fill_(float("nan"))


def retained(model: Net, x: torch.Tensor) -> None:
    y = model(x)
    y.retain_grad()
    y.square().mean().backward()
    assert y.grad is not None
    y.grad.fill_(float("nan"))


def evaluated(model: Net, x: torch.Tensor) -> None:
    """The model is used and saved between backward and step."""
    plain(model, x)
    training = model.training
    with torch.no_grad():
        model.eval()(x)
    model.train(training)
    torch.save(model, io.BytesIO())
    copy.deepcopy(model)


def summed(model: Net, x: torch.Tensor) -> None:
    """The last layer's gradient is one number, expanded."""
    model(x).sum().backward()


def asked_for(model: Net, x: torch.Tensor) -> None:
    torch.autograd.grad(model(x).sum(), [model.first.weight, model.last.weight])
    plain(model, x)


SCRIPTS = [plain, twice, penalised, clipped, changed, zeroed, overwritten_input, retained, evaluated, summed, asked_for]


class Side:
    """A model as a worker has it."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = Net()
        self.replica = Replica(self.model, {id(p): 0 for p in self.model.parameters()}, servers=2)
        self.replica.catch_gradients()
        self.gradient_buffers = GradientBuffers(self.replica.layout, shared=False)
        self.replica.load({chunk.id: self.replica.first_weights(chunk.id) for chunk in self.replica.layout.chunks})

    def first(self, script: Script, x: torch.Tensor) -> dict[int, Sum]:
        gradient_buffer = self.gradient_buffers.take(lambda gradient_buffer: False)
        self.replica.reset_buffers()
        self.replica.contribute_to(gradient_buffer)
        script(self.model, x)
        return self.replica.gradient(SAMPLES)

    def added(self, script: Script, x: torch.Tensor, sums: dict[int, Sum]) -> dict[int, Sum]:
        self.replica.reset_buffers()
        self.replica.add_to(self.gradient_buffers._gradient_buffers[0])
        script(self.model, x)
        return self.replica.added(SAMPLES, sums)

    def flat(self, sums: dict[int, Sum]) -> torch.Tensor:
        return torch.cat([sums[chunk.id].values * sums[chunk.id].scale for chunk in self.replica.layout.chunks])


@pytest.mark.parametrize("other", SCRIPTS)
@pytest.mark.parametrize("one", [plain, twice, penalised])
def test_sums_have_the_same_bits(one: Script, other: Script) -> None:
    """Have `one` and `other` contribute x and y, added where the first one is, and apart."""
    x, y = torch.randn(2, SAMPLES, 320)
    inside, apart = Side(), Side()
    total = inside.added(other, y, inside.first(one, x))
    left, right = apart.first(one, x), apart.first(other, y)
    expected = {chunk.id: adder(chunk)(left[chunk.id], right[chunk.id]) for chunk in apart.replica.layout.chunks}
    assert torch.equal(inside.flat(total).view(torch.int32), apart.flat(expected).view(torch.int32))
    assert {c: s.present for c, s in total.items()} == {c: s.present for c, s in expected.items()}
    assert all(type(p) is nn.Parameter and p.grad is None for p in inside.model.parameters())


class Reused(nn.Module):
    """A layer that is used as often as it is told, and in those ways."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Linear(256, 256, bias=False)
        self.last = nn.Linear(256, 256)

    def forward(self, x: torch.Tensor, uses: list[str]) -> torch.Tensor:
        h, penalty = x, torch.zeros(())
        for use in uses:
            if use == "layer":
                h = torch.tanh(self.core(h))
            elif use == "function":
                h = torch.tanh(h @ self.core.weight.T)
            else:
                penalty = penalty + self.core.weight.square().sum()
        return self.last(h).square().mean() + 1e-3 * penalty


USES = st.lists(st.lists(st.sampled_from(["layer", "layer", "function", "penalty"]), max_size=4), min_size=1, max_size=2)


@pytest.mark.usefixtures("one_thread")
@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(USES, USES), min_size=1, max_size=3), st.integers(0, 99))
def test_a_weight_may_be_used_any_number_of_times_in_any_backward(rounds: list[tuple[Any, Any]], seed: int) -> None:
    """Each round has two micro-batches, each of those one or two backwards, each of those so many uses of a layer's weight."""
    torch.manual_seed(seed)
    ours, theirs = Reused(), Reused()
    theirs.load_state_dict(ours.state_dict())
    replica = Replica(ours, {id(p): 0 for p in ours.parameters()}, servers=2)
    replica.catch_gradients()
    gradient_buffer = GradientBuffers(replica.layout, shared=False).take(lambda gradient_buffer: False)
    for both in rounds:
        sums: dict[int, Sum] = {}
        expected: dict[str, torch.Tensor] = {}
        for backwards in both:
            x = torch.randn(len(backwards), SAMPLES, 256)
            (replica.add_to if sums else replica.contribute_to)(gradient_buffer)
            for model in (ours, theirs):
                for part, uses in zip(x, backwards, strict=True):
                    model(part, uses).backward()
            sums = replica.added(SAMPLES, sums) if sums else replica.gradient(SAMPLES)
            for name, parameter in theirs.named_parameters():
                if parameter.grad is not None:
                    expected[name] = expected[name] + parameter.grad if name in expected else parameter.grad
                parameter.grad = None
        for chunk in replica.layout.chunks:
            for bit, piece in enumerate(chunk.pieces):
                name = replica.specs[piece.tensor].name
                assert bool(sums[chunk.id].present >> bit & 1) == (name in expected)
                values = sums[chunk.id].values[piece.offset : piece.offset + piece.length] * sums[chunk.id].scale
                assert name not in expected or torch.equal(values, SAMPLES * expected[name].reshape(-1))
