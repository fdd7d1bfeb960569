"""Gradients of linear layers, written where they are contributed from, have every bit of autograd's own."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from roundtable.worker.replica import inplace_wgrad
from roundtable.worker.replica.gradient_buffers import GradientBuffer, GradientBuffers
from roundtable.worker.replica.replica import Replica


@pytest.fixture(autouse=True)
def every_layer_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inplace_wgrad, "_LARGE_BYTES", 0)
    monkeypatch.setattr("roundtable.worker.replica.tensors.gradient_capture._SMALL_BYTES", 0)


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


def setting() -> tuple[nn.Module, Replica, GradientBuffers, GradientBuffer]:
    torch.manual_seed(3)
    model = Net()
    replica = Replica(model, {id(p): 0 for p in model.parameters()}, servers=2)
    gradient_buffers = GradientBuffers(replica.layout, shared=True)
    replica.catch_gradients()
    gradient_buffer = gradient_buffers.take(lambda gradient_buffer: False)
    replica.contribute_to(gradient_buffer)
    return model, replica, gradient_buffers, gradient_buffer


def untouched() -> nn.Module:
    torch.manual_seed(3)
    return Net()


def flat(replica: Replica, sums: Any) -> torch.Tensor:
    return torch.cat([sums[chunk.id].values * sums[chunk.id].scale for chunk in replica.layout.chunks])


def expected(replica: Replica, model: nn.Module, samples: int) -> torch.Tensor:
    """The contribution gathered from the gradients of a model that has nothing of ours in it."""
    other = Replica(model, {id(p): 0 for p in model.parameters()}, servers=2)
    other.contribute_to(GradientBuffers(other.layout, shared=False).take(lambda gradient_buffer: False))
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
    model, _replica, _, gradient_buffer = setting()
    copied: list[tuple[int, ...]] = []
    real = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: copied.append(tuple(self.shape)) or real(self, other))
    plain(model, torch.randn(12, 24)).backward()
    assert (320, 24) not in copied and (160, 320) not in copied
    start, end = gradient_buffer.memory.data_ptr(), gradient_buffer.memory.data_ptr() + gradient_buffer.memory.numel()
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
    model, replica, _, gradient_buffer = setting()
    before = gradient_buffer.memory.clone()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        plain(other, torch.randn(12, 24)).backward()
        assert other.last.weight.grad is not None
    assert torch.equal(gradient_buffer.memory, before)
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


X, T = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(1))


def squares(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: plain(model, x)


def of_parameters(model: nn.Module) -> Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor]:
    return lambda parameters, x: functional_call(model, parameters, (x,)).square().sum()


def pulled_back(model: nn.Module) -> Any:
    y, pull = vjp(model, X)
    return y, pull(torch.ones_like(y))


def of_each_sample(model: nn.Module) -> Any:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return vmap(grad(of_parameters(model)), in_dims=(None, 0))(parameters, X[:, None])


def dual(model: nn.Module) -> Any:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(model(forward_ad.make_dual(X, T))))


def dual_backward(model: nn.Module) -> Any:
    y = model(X)
    with forward_ad.dual_level():
        y.backward(forward_ad.make_dual(torch.ones_like(y), y.detach()))
        return [forward_ad.unpack_dual(p.grad).primal.clone() for p in model.parameters()]


def batched(model: nn.Module) -> Any:
    y = model(X)
    return torch.autograd.grad(
        y, list(model.parameters()), torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(2)), is_grads_batched=True
    )


def traced(model: nn.Module) -> Any:
    model.traced = torch.jit.trace(model, (X,))
    model.traced(T).sum().backward()
    return [p.grad for p in model.parameters()]


TRANSFORMED: dict[str, Callable[[nn.Module], Any]] = {
    "grad": lambda model: grad(squares(model))(X),
    "grad of parameters": lambda model: grad(of_parameters(model))(dict(model.named_parameters()), X),
    "jvp": lambda model: jvp(model, (X,), (T,)),
    "vjp": pulled_back,
    "jacrev": lambda model: jacrev(squares(model))(X),
    "jacfwd": lambda model: jacfwd(squares(model))(X),
    "hessian": lambda model: hessian(squares(model))(X[:1]),
    "vmap": lambda model: vmap(model)(torch.stack([X, T])),
    "vmap of grad": of_each_sample,
    "dual numbers": dual,
    "dual numbers in backward": dual_backward,
    "batched gradients": batched,
    "hvp": lambda model: torch.autograd.functional.hvp(squares(model), X, T),
    "trace": traced,
}


def leaves(found: Any) -> list[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        return [found]
    return [leaf for part in (found.values() if isinstance(found, dict) else found or ()) for leaf in leaves(part)]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("what", TRANSFORMED)
def test_what_torch_can_do_with_a_function_it_can_do_with_a_replica(what: str) -> None:
    model, _, _, _ = setting()
    found, expected = leaves(TRANSFORMED[what](model)), leaves(TRANSFORMED[what](untouched()))
    assert expected and all(map(torch.equal, found, expected)) and len(found) == len(expected)


@pytest.mark.parametrize("sizes", [(24, 0, 7), (0, 7), (24, 5, 0)])
def test_a_layer_without_inputs_or_outputs_is_trained_as_by_autograd(sizes: tuple[int, ...]) -> None:
    def network() -> nn.Module:
        torch.manual_seed(3)
        with pytest.warns(UserWarning, match="zero-element"):
            return nn.Sequential(*itertools.starmap(nn.Linear, itertools.pairwise(sizes)))

    ours, theirs = network(), network()
    replica = Replica(ours, {id(p): 0 for p in ours.parameters()}, servers=2)
    replica.catch_gradients()
    replica.contribute_to(GradientBuffers(replica.layout, shared=False).take(lambda gradient_buffer: False))
    for model in (ours, theirs):
        model(X[:, : sizes[0]]).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert torch.equal(flat(replica, replica.gradient(6)), expected(replica, theirs, 6))
