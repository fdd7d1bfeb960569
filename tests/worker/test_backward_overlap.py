"""Early pushes have the bits of those at `step`, and count only if the script has left the gradients alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from roundtable.common.model.partial_sum import Sum, adder
from roundtable.worker.contribute.backward_overlap import OverlappedPush, TreeJoin
from roundtable.worker.replica.gradient_buffers import GradientBuffer, GradientBuffers
from roundtable.worker.replica.replica import Replica


class Net(nn.Module):
    """Small layers that share a chunk, one cut into two chunks, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 600)
        self.large = nn.Linear(600, 1900)
        self.last = nn.Linear(1900, 3)
        self.unused = nn.Parameter(torch.ones(100_000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.large(self.first(x).relu()).relu())


class Setting:
    def __init__(self, samples: int = 8, joins: int = 0) -> None:
        torch.manual_seed(1)
        self.model = Net()
        self.replica = Replica(self.model, {id(p): 0 for p in self.model.parameters()}, servers=2)
        self.replica.catch_gradients()
        self.gradient_buffers = GradientBuffers(self.replica.layout, shared=False)
        self.gradient_buffer = self.gradient_buffers.take(lambda gradient_buffer: False)
        self.replica.contribute_to(self.gradient_buffer)
        self.samples = samples
        self.others = [self._other() for _ in range(joins)]
        #: A chunk that the server reads from this worker's memory.
        self.read = self.replica.layout.chunks[-1].id
        #: What went out, as it was then.
        self.sent: dict[int, tuple[torch.Tensor, int]] = {}
        self.early = OverlappedPush(
            self.replica,
            self.gradient_buffer,
            samples,
            [TreeJoin(other, on_left=bool(n % 2)) for n, other in enumerate(self.others)],
            lambda: self.gradient_buffers.take(lambda gradient_buffer: False),
            self._send,
            lambda chunk: chunk != self.read,
        )
        self.replica.capture.on_gradient = self.early.made

    def _other(self) -> dict[int, Sum]:
        """A contribution that was computed before."""
        return {c.id: Sum(torch.randn(c.numel), 1, owned=True, scale=4.0) for c in self.replica.layout.chunks}

    def _send(self, chunk: int, value: Sum, gradient_buffer: GradientBuffer) -> None:
        assert chunk not in self.sent
        assert value.values.data_ptr() == gradient_buffer.chunks[chunk].data_ptr()
        self.sent[chunk] = value.values * value.scale, value.present

    def backward(self) -> None:
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
        self.model(x).square().sum().backward()

    def expected(self) -> dict[int, tuple[torch.Tensor, int]]:
        """The contribution at `step`."""
        out = {}
        for chunk, value in self.replica.gradient(self.samples).items():
            for n, other in enumerate(self.others):
                add = adder(self.replica.layout.chunks[chunk])
                value = add(other[chunk], value) if n % 2 else add(value, other[chunk])
            out[chunk] = value.values * value.scale, value.present
        return out


@pytest.mark.parametrize("joins", [0, 1, 2])
@pytest.mark.parametrize("samples", [8, 7])
def test_every_bit_is_that_of_a_push_at_the_step(samples: int, joins: int) -> None:
    setting = Setting(samples, joins)
    setting.backward()
    good = setting.early.unchanged()
    unused = next(c.id for c in setting.replica.layout.chunks if len(setting.model.unused) in [p.length for p in c.pieces])
    assert good == setting.sent.keys() == {c.id for c in setting.replica.layout.chunks} - {setting.read, unused}
    expected = setting.expected()
    for chunk, (values, present) in setting.sent.items():
        assert torch.equal(values, expected[chunk][0])
        assert present == expected[chunk][1]


def scaled(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(0.5)


def clamped_behind_torchs_back(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.data.clamp_(-1e-3, 1e-3)


def replaced(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad * 1.0


def taken_away(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


@pytest.mark.parametrize("change", [scaled, clamped_behind_torchs_back, replaced, taken_away])
def test_a_script_that_changes_gradients_takes_back_what_was_pushed(change: Callable[[nn.Module], None]) -> None:
    setting = Setting()
    setting.backward()
    assert setting.sent
    change(setting.model)
    assert setting.early.unchanged() == set()


def test_so_does_a_second_backward_and_the_others_count() -> None:
    setting = Setting()
    setting.backward()
    setting.model.last(torch.ones(1, 1900)).sum().backward()
    good = setting.early.unchanged()
    bad = setting.sent.keys() - good
    pieces = {chunk: [setting.replica.specs[p.tensor].name for p in setting.replica.layout.chunks[chunk].pieces] for chunk in bad}
    assert good
    assert bad
    assert all(any(name.startswith("last") for name in names) for names in pieces.values())
