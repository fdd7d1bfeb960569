"""Tensors of every form go from a replica to the servers' stores and back, and train as in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from roundtable.common.config.settings import Settings
from roundtable.common.model.layout import CHUNK_BYTES
from roundtable.common.model.partial_sum import adder
from roundtable.common.model.reduction_tree import fold
from roundtable.common.model.tensor_bytes import to_frame
from roundtable.common.policies import load
from roundtable.common.protocol.messages.setup import Update
from roundtable.common.runtime.errors import UsageError
from roundtable.ps.params.dense import DenseParameters
from roundtable.worker.optim.optimizer import example_optimizer, is_whole, parameter_groups, plain_settings
from roundtable.worker.replica.buffers import Rules
from roundtable.worker.replica.gradient_buffers import GradientBuffers
from roundtable.worker.replica.replica import Replica

Forward = Callable[[nn.Module, int], torch.Tensor]


class Cluster:
    """One worker's replica and the stores of all servers, without anything between them."""

    def __init__(
        self, model: nn.Module, servers: int, cls: Any, params: Any = None, rules: Rules | None = None, **hyper: Any
    ) -> None:
        groups = parameter_groups(model, params)
        assert not is_whole(cls, hyper)
        update = Update(cls.__name__, plain_settings(example_optimizer(cls, groups, hyper)))
        group_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        self.replica = Replica(model, group_of, servers, rules=rules)
        self.gradient_buffers = GradientBuffers(self.replica.layout, shared=False)
        self.replica.catch_gradients()
        self.stores = [DenseParameters(self.replica.layout, number, update, load(Settings())) for number in range(servers)]
        for chunk in range(len(self.replica.layout.chunks)):
            self.store(chunk).load(chunk, bytes(self.replica.first_weights(chunk)))
        self.pull()

    def store(self, chunk: int) -> DenseParameters:
        return self.stores[self.replica.layout.chunks[chunk].server]

    def pull(self) -> None:
        self.replica.load({c.id: to_frame(self.store(c.id).publish(c.id)) for c in self.replica.layout.chunks})

    def round(self, losses: list[Callable[[], torch.Tensor]], samples: list[int]) -> None:
        """One round: the loss of each micro-batch is computed, and its gradient contributed as coming over the wire."""
        terms = []
        for loss, count in zip(losses, samples, strict=True):
            self.replica.reset_buffers()
            self.replica.contribute_to(self.gradient_buffers.take(lambda gradient_buffer: False))
            value = loss()
            if value.requires_grad:
                value.backward()
            sums = self.replica.gradient(count)
            terms.append({i: self.store(i).receive(i, bytes(to_frame(s.values)), s.present, s.scale) for i, s in sums.items()})
        for chunk in self.replica.layout.chunks:
            total = fold({k: term[chunk.id] for k, term in enumerate(terms)}, len(terms), adder(chunk))
            self.store(chunk.id).apply(chunk.id, [total], sum(samples), {})
        self.pull()


class Odd(nn.Module):
    """A parameter of every form: tied, larger than a chunk and not contiguous, scalar, empty, in a list, frozen, never used,
    used every other round; and buffers that are constant."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.convolution = nn.Conv2d(8, 520, (17, 16)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        assert self.convolution.weight.nbytes > CHUNK_BYTES and not self.convolution.weight.is_contiguous()
        self.back = nn.Linear(520, 8)
        self.transposed = nn.Parameter(torch.randn(5, 8).t())
        assert not self.transposed.is_contiguous()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.several = nn.ParameterList([torch.randn(8), torch.randn(1, 8)])
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))
        self.sometimes = nn.Linear(8, 8)
        self.register_buffer("constant", torch.randn(50))
        self.register_buffer("mask", torch.tensor([0.0, float("-inf"), torch.finfo(torch.float32).min]), persistent=False)
        self.register_buffer("positions", torch.arange(4))

    def forward(self, tokens: torch.Tensor, extra: bool) -> torch.Tensor:
        h = self.embedding(tokens)
        h = h + self.back(self.convolution(h[:, :, None, None].expand(-1, -1, 17, 16).contiguous()).flatten(1))
        h = h * self.scale + self.several[0] * self.several[1] + self.transposed.sum(1) + self.empty.sum()
        if extra:
            h = torch.tanh(self.sometimes(h))
        logits: torch.Tensor = self.head(h)
        return logits


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Decay for matrices only, and the usual list of everything else, frozen parameters included."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.ndim < 2], "lr": 0.01}]


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize(
    ("cls", "hyper"),
    [(torch.optim.AdamW, {"lr": 0.02}), (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01})],
    ids=["AdamW", "SGD"],
)
def test_a_model_with_parameters_of_every_form_trains_as_in_plain_torch(cls: Any, hyper: dict[str, Any], servers: int) -> None:
    torch.manual_seed(1)
    plain, ours = Odd(), Odd()
    ours.load_state_dict(plain.state_dict())
    ours.mask.copy_(plain.mask)  # type: ignore[operator]
    before = {name: tensor.clone() for name, tensor in ours.named_buffers()}
    optimizer = cls(groups_of(plain), **hyper)
    cluster = Cluster(ours, servers, cls, groups_of(ours), **hyper)
    for step in range(3):
        tokens = torch.arange(4) + step
        optimizer.zero_grad()
        cross_entropy(plain(tokens, step % 2 == 1), tokens).backward()
        optimizer.step()
        cluster.round([lambda t=tokens, s=step: cross_entropy(ours(t, s % 2 == 1), t)], [4])  # type: ignore[misc]
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert ours.head.weight is ours.embedding.weight
    assert ours.convolution.weight.is_contiguous(memory_format=torch.channels_last)
    for name, tensor in ours.named_buffers():
        assert torch.equal(tensor, before[name]), name


def test_a_buffer_that_did_not_change_keeps_its_bits_where_the_mean_would_not() -> None:
    """Three thirds of a number are not the number; and the largest number times the samples is infinite."""
    values = torch.cat([torch.rand(1000, generator=torch.Generator().manual_seed(0)), torch.tensor([torch.finfo().max])])
    thirds = [values * 10, values * 10, values * 3]
    assert not torch.equal(((thirds[0] + thirds[1]) + thirds[2]) / 23, values)
    model = nn.Linear(1, 1)
    model.register_buffer("constant", values.clone())
    model.register_buffer("moving", torch.zeros(2))
    cluster = Cluster(model, 1, torch.optim.SGD, rules={"*": "mean"}, lr=0.0)

    def loss(k: int) -> torch.Tensor:
        if k:  # not in the first micro-batch
            model.moving += k  # type: ignore[operator]
        out: torch.Tensor = model(torch.ones(1)).sum()
        return out

    cluster.round([lambda k=k: loss(k) for k in range(3)], [10, 10, 3])  # type: ignore[misc]
    assert torch.equal(model.constant, values)  # type: ignore[arg-type]
    assert model.moving.tolist() == [pytest.approx((0 * 10 + 1 * 10 + 2 * 3) / 23)] * 2  # type: ignore[operator, union-attr]


def test_a_sparse_gradient_counts_as_the_dense_one() -> None:
    torch.manual_seed(2)
    plain, ours = nn.Embedding(9, 3), nn.Embedding(9, 3, sparse=True)
    ours.load_state_dict(plain.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1)
    cluster = Cluster(ours, 2, torch.optim.AdamW, lr=0.1)
    for step in range(3):
        tokens = torch.tensor([step, 5, 5])
        optimizer.zero_grad()
        plain(tokens).square().mean().backward()
        optimizer.step()
        cluster.round([lambda t=tokens: ours(t).square().mean()], [4])  # type: ignore[misc]
    assert torch.equal(plain.weight, ours.weight)


def test_a_double_precision_model_keeps_its_precision() -> None:
    torch.manual_seed(3)
    plain, ours = nn.Linear(7, 5).double(), nn.Linear(7, 5).double()
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(4, 7, dtype=torch.float64)
    optimizer = torch.optim.AdamW(plain.parameters())
    cluster = Cluster(ours, 2, torch.optim.AdamW)
    for _ in range(3):
        optimizer.zero_grad()
        plain(x).square().mean().backward()
        optimizer.step()
        cluster.round([lambda: ours(x).square().mean()], [4])
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))


def test_updates_too_small_for_half_precision_add_up() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    cluster = Cluster(model, 1, torch.optim.SGD, lr=1.0)
    for _ in range(16):
        cluster.round([lambda: model(torch.tensor([2.0**-12]).bfloat16()).sum()], [4])
    assert torch.ones((), dtype=torch.bfloat16) - 2**-12 == 1.0 and model.weight.item() == 1.0 - 2**-8


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]), "'0' has dtype complex64"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)), "'1.weight' has no shape yet"),
        (lambda: nn.ParameterList([square := torch.randn(2, 2), nn.Parameter(square.t())]), "'1' and '0' are two tensors in"),
        (lambda: nn.Linear(2, 2).to(torch.float8_e4m3fn), "'weight' has dtype float8_e4m3fn"),
    ],
    ids=["complex", "lazy", "views of one memory", "float8"],
)
def test_what_cannot_be_trained_is_refused_in_a_sentence(make: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Cluster(make(), 2, torch.optim.SGD)
    assert str(caught.value).startswith(said) and str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_small_gradients_are_taken_over_together_unless_each_is_waited_for() -> None:
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(40)))
    replica = Replica(model, {id(p): 0 for p in model.parameters()}, servers=2)
    replica.catch_gradients()
    gradient_buffer = GradientBuffers(replica.layout, shared=False).take(lambda gradient_buffer: False)
    made: list[int] = []
    for is_told in (False, True):
        replica.contribute_to(gradient_buffer)
        replica.capture.on_gradient = made.append if is_told else None
        model[3:](torch.randn(4, 5)).sum().backward()
        model[5].weight.grad = model[5].weight.grad.to_sparse()
        expected = [None if p.grad is None else p.grad.to_dense().flatten() for p in model.parameters()]
        sums = replica.gradient(4)
        for chunk in replica.layout.chunks:
            for bit, piece in enumerate(chunk.pieces):
                values, gradient = sums[chunk.id].values[piece.offset : piece.offset + piece.length], expected[piece.tensor]
                assert bool(sums[chunk.id].present >> bit & 1) == (gradient is not None)
                assert torch.equal(values, torch.zeros(piece.length) if gradient is None else gradient)
        assert sorted(made) == (list(range(6, 80)) if is_told else [])
