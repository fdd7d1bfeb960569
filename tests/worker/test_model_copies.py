"""Copies of a model in training, in memory and in files, are plain tensors in memory of their own."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from roundtable.common.model.layout import Chunk
from roundtable.common.runtime.errors import UsageError
from roundtable.ps.params.weight_buffers import WeightBuffers
from roundtable.worker.replica import inplace_wgrad
from roundtable.worker.replica.gradient_buffers import GradientBuffers
from roundtable.worker.replica.lazy_weights import LazyWeights
from roundtable.worker.replica.mapped_weights import InWeightBuffer
from roundtable.worker.replica.replica import Replica

pytestmark = pytest.mark.usefixtures("one_thread")

SERVERS = 2


class Training:
    """A model in training whose servers are played here; `transport` says whether their memory is shared with it."""

    def __init__(self, transport: str) -> None:
        torch.manual_seed(0)
        # one tensor in several chunks, one that a chunk has for itself, and small ones that share a chunk
        self.model = nn.Sequential(nn.Linear(1100, 1000), nn.BatchNorm1d(1000), nn.Linear(1000, 30), nn.Linear(30, 2))
        self.replica = Replica(self.model, {id(p): 0 for p in self.model.parameters()}, SERVERS)
        self.weight_buffers = [
            WeightBuffers(self.replica.layout.on(server), 4, shared=transport == "auto") for server in range(SERVERS)
        ]
        for server, weight_buffers in enumerate(self.weight_buffers):
            if weight_buffers.handle is not None:
                self.replica.mapped.attach(server, weight_buffers.handle)
        self.awaited = LazyWeights(self.replica, lambda index: self.arrive())
        self.gradient_buffers = GradientBuffers(self.replica.layout, shared=transport == "auto")
        self.version = 0

    def begin(self) -> None:
        self.replica.catch_gradients()
        self.replica.contribute_to(self.gradient_buffers.take(lambda gradient_buffer: False))
        self.publish()

    def publish(self) -> None:
        """Have servers write the next version, for which the model waits."""
        self.version += 1
        for chunk in self.replica.layout.chunks:
            self.weight_buffers[chunk.server][self.version % 4][chunk.id].copy_(torch.arange(chunk.numel) % 97 + self.version)
        if self.version == 1:
            self.arrive()
        else:
            self.awaited.expect(chunk.id for chunk in self.replica.layout.chunks if chunk.kind == "param")

    def arrive(self) -> None:
        weight_buffer = self.version % 4
        shared = {chunk.id: InWeightBuffer(chunk.server, weight_buffer) for chunk in self.replica.layout.chunks}
        if self.weight_buffers[0].handle is None:
            sent = {
                c.id: memoryview(self.weight_buffers[c.server][weight_buffer][c.id].clone().view(torch.uint8).numpy())
                for c in self.chunks
            }
            self.replica.load(sent, copy=False)
        else:
            self.replica.load(shared, copy=False)
        self.awaited.came(shared)

    @property
    def chunks(self) -> list[Chunk]:
        return self.replica.layout.chunks

    def backward(self) -> None:
        self.model(torch.randn(4, 1100)).square().mean().backward()


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    assert file.tell() < 1.01 * sum(t.nbytes for t in model.state_dict().values())  # no chunk, and none twice
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(model: nn.Module) -> nn.Module:
    text = pickle.dumps(model)
    assert len(text) < 1.01 * sum(t.nbytes for t in model.state_dict().values())
    return pickle.loads(text)


def as_safetensors(model: nn.Module) -> nn.Module:
    path = Path("model.safetensors")
    safetensors.torch.save_model(model, str(path))
    other = nn.Sequential(nn.Linear(1100, 1000), nn.BatchNorm1d(1000), nn.Linear(1000, 30), nn.Linear(30, 2))
    safetensors.torch.load_model(other, str(path))
    return other


def averaged(model: nn.Module) -> nn.Module:
    average = AveragedModel(model)
    average.update_parameters(model)
    return copy.deepcopy(average).module


def layer_by_layer(model: nn.Module) -> nn.Module:
    return nn.Sequential(*(copy.deepcopy(layer) for layer in model.children()))


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "layers": layer_by_layer,
    "pickle": pickled,
    "torch.save": saved,
    "safetensors": as_safetensors,
    "average": averaged,
}


def before(training: Training) -> None:
    """The optimizer is not there yet."""


def at_the_beginning(training: Training) -> None:
    training.begin()


def after_backward(training: Training) -> None:
    training.begin()
    training.backward()


def while_weights_are_awaited(training: Training) -> None:
    training.begin()
    training.backward()
    training.replica.gradient(4)
    training.publish()
    assert training.awaited.any


def at_the_end(training: Training) -> None:
    while_weights_are_awaited(training)
    training.arrive()


@pytest.mark.parametrize("transport", ["auto", "tcp"])
@pytest.mark.parametrize("moment", [before, at_the_beginning, after_backward, while_weights_are_awaited, at_the_end])
def test_a_copy_is_plain_and_has_memory_of_its_own(
    moment: Callable[[Training], None], transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, make in COPIES.items():
        training = Training(transport)
        moment(training)
        made = make(training.model)
        assert not training.awaited.any, name
        right = {key: value.clone() for key, value in training.model.state_dict().items()}
        if training.version:
            assert float(right["3.bias"][0]) != float(Training(transport).model[3].bias.detach()[0])
        parameters = dict(made.named_parameters())
        assert parameters.keys() == dict(training.model.named_parameters()).keys()
        assert all(type(p) is nn.Parameter and p.grad is None and p.requires_grad for p in parameters.values()), name
        storages = {t.untyped_storage().data_ptr() for t in made.state_dict().values()}
        assert len(storages) == len(right), name
        assert not storages & {t.untyped_storage().data_ptr() for t in training.model.state_dict().values()}, name
        for weight_buffers in training.weight_buffers:  # what servers write later is not the copy's
            for weight_buffer in range(4):
                for values in weight_buffers[weight_buffer].values():
                    values.fill_(-7.0)
        assert all(torch.equal(value, right[key]) for key, value in made.state_dict().items()), name
        made(torch.randn(4, 1100)).sum().backward()
        assert all(p.grad is not None for p in made.parameters()), name


def test_a_copy_is_trained_and_the_model_knows_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inplace_wgrad, "_LARGE_BYTES", 0)
    training = Training("auto")
    training.begin()
    other = copy.deepcopy(training.model)
    x = torch.randn(4, 1100)
    other(x).square().mean().backward()
    assert all(p.grad is None for p in training.model.parameters())
    gradient_buffer = training.replica.capture.gradient_buffer
    ends = gradient_buffer.memory.data_ptr(), gradient_buffer.memory.data_ptr() + gradient_buffer.memory.nbytes
    assert not any(p.grad is None or ends[0] <= p.grad.data_ptr() < ends[1] for p in other.parameters())
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert not torch.equal(other[3].weight, training.model[3].weight)


def test_scripted_models_have_the_bits_of_plain_ones_at_each_call() -> None:
    """Left to itself, torch computes a scripted model's gradients in another way from the second call on."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4), nn.LayerNorm(4))
    scripted = torch.jit.script(copy.deepcopy(plain))
    replica = Replica(scripted, {id(p): 0 for p in scripted.parameters()}, servers=1)
    replica.catch_gradients()
    awaited = LazyWeights(replica, lambda index: None)
    assert awaited.needed_first == {chunk.id for chunk in replica.layout.chunks}
    gradient_buffers = GradientBuffers(replica.layout, shared=False)
    for _ in range(5):
        gradient_buffer = gradient_buffers.take(lambda gradient_buffer: False)
        replica.contribute_to(gradient_buffer)
        x = torch.randn(4, 8)
        scripted(x).square().mean().backward()
        plain.zero_grad()
        plain(x).square().mean().backward()
        for ours, theirs in zip(scripted.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)
        replica.gradient(4)
        gradient_buffer.taken = False


def to_double(training: Training) -> None:
    training.model.double()


def last_to_half(training: Training) -> None:
    training.model[3].half()


@pytest.mark.parametrize(
    ("convert", "text"), [(to_double, "'0.weight' torch.float64"), (last_to_half, "'3.weight' torch.float16")]
)
@pytest.mark.parametrize("transport", ["auto", "tcp"])
@pytest.mark.parametrize("moment", [before, at_the_beginning, after_backward, while_weights_are_awaited, at_the_end])
def test_a_dtype_that_servers_have_not_is_told(
    moment: Callable[[Training], None], transport: str, convert: Callable[[Training], None], text: str
) -> None:
    training = Training(transport)
    moment(training)
    convert(training)
    for check in (training.replica.check_dtypes, training.arrive):
        with pytest.raises(UsageError) as caught:
            check()
        assert text in str(caught.value)
        assert "as torch.float32: convert the model before" in str(caught.value)


def test_backward_of_a_converted_model_leaves_it_to_the_check() -> None:
    training = Training("auto")
    training.begin()
    training.model.double()
    training.model(torch.randn(4, 1100, dtype=torch.float64)).square().mean().backward()
    with pytest.raises(UsageError):
        training.replica.check_dtypes()
