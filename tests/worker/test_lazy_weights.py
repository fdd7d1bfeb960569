"""Whatever touches a weight that is still to come waits for it; what says nothing of its values does not."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import func, nn
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from roundtable.worker.replica.lazy_weights import LazyWeights
from roundtable.worker.replica.replica import Replica


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.last = nn.Linear(5, 4)
        self.recurrent = nn.LSTM(4, 4)
        self.own = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.last(self.norm(self.first(x)))
        return self.recurrent(y)[0] + self.own + nn.functional.linear(y, self.first.weight[:4])


class Waiting:
    """A model all of whose parameters are awaited; `came` lists those that something has waited for."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Net()
        self.replica = Replica(self.model, {id(p): 0 for p in self.model.parameters()}, servers=1)
        self.names = [spec.name for spec in self.replica.specs]
        self.right = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.came: list[str] = []
        # each tensor as if it were a chunk of its own
        self.awaited = LazyWeights(self.replica, self._arrive)
        self.chunks = [chunk.id for chunk in self.replica.layout.chunks if chunk.kind == "param"]
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(float("nan"))
        self.awaited.expect(self.chunks)

    def _arrive(self, index: int) -> None:
        self.came.append(self.names[index])
        self.awaited.came(self.chunks)
        for name, tensor in zip(self.names, self.replica.tensors, strict=True):
            if isinstance(tensor, nn.Parameter):
                tensor.data.copy_(self.right[name])


class Kept(torch.autograd.Function):
    """Saves the weight before it is used."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return weight * weight

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (weight,) = ctx.saved_tensors
        return gradients[0] * 2 * weight


def dual(m: Net) -> torch.Tensor:
    with forward_ad.dual_level():
        made = forward_ad.make_dual(m.own, torch.ones(4))
        return torch.stack(forward_ad.unpack_dual(made * made)[:2])  # type: ignore[arg-type]


def stateless(m: Net, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = func.functional_call(m.first, dict(m.first.named_parameters()), (x,))
    return out


def per_sample(m: Net) -> torch.Tensor:
    weights = dict(m.first.named_parameters())

    def loss(given: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = func.functional_call(m.first, given, (x,)).square().sum()
        return out

    return func.vmap(func.grad(loss), in_dims=(None, 0))(weights, torch.ones(3, 4))["weight"]


def square(w: torch.Tensor) -> torch.Tensor:
    return w * w


USES: dict[str, Callable[[Net], Any]] = {
    "forward": lambda m: m(torch.ones(3, 4)).sum(),
    "a layer": lambda m: m.first(torch.ones(3, 4)),
    "a penalty": lambda m: sum(p.norm() for p in m.parameters()),
    "a list": lambda m: torch.stack(torch._foreach_norm(list(m.parameters()))),
    "an expression": lambda m: 1 + m.own,
    "an element": lambda m: m.own[2],
    "data": lambda m: m.own.data.sum(),
    "numpy": lambda m: m.own.detach().numpy().sum(),
    "state": lambda m: m.state_dict()["own"],
    "a copy": lambda m: copy.deepcopy(m).own,
    "a vector": lambda m: nn.utils.parameters_to_vector(m.parameters()),
    "another's forward": lambda m: nn.functional.linear(torch.ones(1, 4), m.first.weight),
    "a function of one's own": lambda m: Kept.apply(m.own),
    "a functional call": lambda m: stateless(m, torch.ones(3, 4)),
    "another module's call": lambda m: func.functional_call(nn.Linear(4, 5), dict(m.first.named_parameters()), torch.ones(3, 4)),
    "grad": lambda m: func.grad(lambda w: (w**3).sum())(m.own),
    "grad of what is closed over": lambda m: func.grad(lambda x: (x * m.own).sum())(torch.ones(4)),
    "gradients of samples": per_sample,
    "vmap": lambda m: func.vmap(lambda w: w * w)(m.own),
    "vmap over what is closed over": lambda m: func.vmap(lambda x: x * m.own)(torch.ones(2, 4)),
    "vjp": lambda m: func.vjp(square, m.own)[1](torch.ones(4))[0],
    "jvp": lambda m: torch.stack(func.jvp(square, (m.own,), (torch.ones(4),))),
    "linearize": lambda m: func.linearize(square, m.own)[1](torch.ones(4)),
    "hessian": lambda m: func.hessian(lambda w: (w**3).sum())(m.own),
    "jacobian": lambda m: func.jacfwd(square)(m.own),
    "functionalize": lambda m: func.functionalize(square)(m.own),
    "forward mode": dual,
    "autograd's hessian": lambda m: torch.autograd.functional.hessian(lambda w: (w**3).sum(), m.own),
    "a checkpoint": lambda m: checkpoint(square, m.own, use_reentrant=False),
    "a map": lambda m: torch.utils._pytree.tree_map(square, [m.own])[0],
    "recurrence": lambda m: m.recurrent(torch.ones(2, 4))[0],
}


@pytest.mark.parametrize("use", USES)
def test_a_use_waits_and_then_finds_the_weights(use: str) -> None:
    waiting = Waiting()
    torch.manual_seed(0)
    value = torch.as_tensor(USES[use](waiting.model))
    torch.manual_seed(0)
    assert waiting.came
    assert torch.isfinite(value).all()
    assert torch.equal(value, torch.as_tensor(USES[use](Net())))
    assert not waiting.awaited.any
    assert all(type(p) is nn.Parameter for p in waiting.model.parameters())


def test_backward_goes_through_weights_that_came_in_mid_forward() -> None:
    waiting = Waiting()
    (Kept.apply(waiting.model.own).sum() + waiting.model(torch.ones(3, 4)).sum()).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in waiting.model.parameters())


def test_what_says_nothing_of_values_does_not_wait() -> None:
    waiting = Waiting()
    for parameter in waiting.model.parameters():
        parameter.grad = None
        assert parameter.requires_grad
        assert parameter.grad is None
        assert parameter.shape == parameter.size()
        assert parameter.numel() > 0
        assert parameter.is_contiguous()
        assert parameter._version >= 0
        assert isinstance(parameter, nn.Parameter)
    assert sum(1 for _ in waiting.model.named_parameters()) == 11
    assert waiting.came == []
    waiting.awaited.give_up()


@pytest.mark.parametrize("first", [0, 1])
def test_models_that_wait_at_once_leave_torch_as_it_was_in_whatever_order_they_end(first: int) -> None:
    begin = eager_transforms._grad_increment_nesting
    models = [Waiting(), Waiting()]
    assert eager_transforms._grad_increment_nesting is not begin
    for waiting in (models[first], models[1 - first]):
        waiting.awaited.give_up()
        assert not waiting.awaited.any
        assert all(type(p) is nn.Parameter for p in waiting.model.parameters())
    assert eager_transforms._grad_increment_nesting is begin
    assert [waiting.came for waiting in models] == [[], []]


def test_buffers_are_never_awaited_and_nothing_is_where_models_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Waiting()
    everything = {chunk.id for chunk in waiting.replica.layout.chunks}
    buffers = everything - set(waiting.chunks)
    assert buffers
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    assert waiting.awaited.needed_first == buffers
    monkeypatch.setitem(sys.modules, "torch._dynamo", torch)
    assert waiting.awaited.needed_first == everything
    waiting.awaited.give_up()
