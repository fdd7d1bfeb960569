"""If a script writes into parameters in mid-training, an error names them. Writes of torch are none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.nn.utils import spectral_norm as old_spectral_norm

from roundtable.common.model.tensor_bytes import to_frame
from roundtable.common.runtime.errors import UsageError
from roundtable.worker.client.context import WorkerContext
from roundtable.worker.client.push_pull import ParameterClient
from roundtable.worker.loop.script_edits import Edits, check_layers
from roundtable.worker.replica.gradient_buffers import GradientBuffers
from roundtable.worker.replica.replica import Replica
from roundtable.worker.session.training import Training


class Script:
    """A run whose servers have the weights that the model had at first."""

    def __init__(self, model: nn.Module, only_frozen: bool = False) -> None:
        self.model = model
        self.replica = Replica(model, {id(p): 0 for p in model.parameters()}, servers=2)
        self.held = {chunk.id: bytes(self.replica.first_weights(chunk.id)) for chunk in self.replica.layout.chunks}
        self.gradient_buffers = GradientBuffers(self.replica.layout, shared=False)
        self.replica.catch_gradients()
        client = SimpleNamespace(
            want_all=lambda: None, pull=lambda *a, **more: [], complete=True, gone=False, take=lambda: (self.frames(), {}),
        )  # fmt: skip
        link = SimpleNamespace(lock=threading.Lock(), send=lambda *messages: None)
        context = SimpleNamespace(io=link, wait=lambda *a: None)
        self.edits = Edits(cast(WorkerContext, context), cast(ParameterClient, client), self.replica, only_frozen)
        self.replica.load(self.frames())
        self.edits.note()

    def frames(self) -> dict[int, Any]:
        return {chunk: to_frame(torch.frombuffer(bytearray(held), dtype=torch.uint8)) for chunk, held in self.held.items()}

    def train(self, x: torch.Tensor) -> None:
        """A micro-batch and new weights, as in a run."""
        self.replica.reset_buffers()
        self.replica.contribute_to(self.gradient_buffers.take(lambda gradient_buffer: False))
        self.model(x).square().mean().backward()
        self.replica.gradient(len(x))
        self.replica.load(self.frames())

    def refusal(self, clock: int | None = 3) -> str:
        with pytest.raises(UsageError) as caught:
            self.edits.check_places()
            self.edits.check(3, clock)
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
        return str(caught.value)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2).requires_grad_(False))


def set_data(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.zeros(3, 4))


def set_module(model: nn.Sequential) -> None:
    model[2] = nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.load_state_dict({k: torch.ones_like(t) for k, t in m.state_dict().items()}), "'0.weight', '0.bias' and"),
        (lambda m: m[2].weight.lerp_(m[2].weight + 1, 0.1), "'2.weight' in round 3"),
        (lambda m: m[0].weight.clamp_(-0.01, 0.01), "'0.weight' in round 3"),
        (lambda m: nn.init.zeros_(m[0].bias), "'0.bias' in round 3"),
        (lambda m: m[1].weight.neg_(), "'1.weight' in round 3"),
        (lambda m: m[0].weight[1, 2].fill_(torch.nan), "'0.weight' in round 3"),
        (set_data, "'0.weight': servers"),
        (set_module, "'2.weight' and '2.bias': servers"),
    ],
)
def test_a_parameter_that_a_script_changes_in_mid_training_is_named(change: Callable[[Any], Any], named: str) -> None:
    torch.manual_seed(0)
    script = Script(network())
    script.train(torch.randn(4, 4))
    script.edits.check(3, 3)
    with torch.no_grad():
        change(script.model)
    assert named in script.refusal()


def test_values_that_were_put_back_are_no_change_where_there_are_others_to_compare() -> None:
    script = Script(network())
    own = {name: tensor.clone() for name, tensor in script.model.state_dict().items()}
    script.model.load_state_dict({name: torch.ones_like(tensor) for name, tensor in own.items()})
    script.model.load_state_dict(own)
    assert script.edits.lost()
    assert "'0.weight'" in script.refusal(clock=None)
    script.edits.check(3, 3)
    assert not script.edits.lost()


def test_where_trained_parameters_are_the_worker_s_own_only_frozen_ones_must_stay() -> None:
    script = Script(network(), only_frozen=True)
    with torch.no_grad():
        script.model[0].weight.add_(1)  # type: ignore[index, operator]
        script.edits.check(3, 3)
        script.model[2].weight.add_(1)  # type: ignore[index, operator]
    assert "changed '2.weight' in round 3" in script.refusal()
    assert bool(script.model[0].weight.mean() > 0.5)  # type: ignore[index, operator, arg-type]


def quantised() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    return nn.Sequential(torch.ao.nn.qat.Linear.from_float(layer))


class Pruned(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not prune.is_pruned(self):
            prune.l1_unstructured(self, "weight", 0.5)
        out: torch.Tensor = super().forward(x)
        return out


class Thawing(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.requires_grad_(not self.weight.requires_grad)
        out: torch.Tensor = super().forward(x)
        return out


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()),
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
        lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
        lambda: old_spectral_norm(nn.Linear(4, 4)),
        lambda: weight_norm(nn.Linear(4, 4)),
        lambda: Pruned(4, 4),
        lambda: Thawing(4, 4),
        quantised,
        lambda: nn.Sequential(nn.Linear(4, 4).to(memory_format=torch.contiguous_format), nn.Linear(4, 4)).bfloat16().float(),
        lambda: torch.jit.trace(nn.Linear(4, 4), torch.zeros(1, 4)),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_what_torch_and_this_package_write_is_no_change_by_the_script(make: Callable[[], nn.Module]) -> None:
    script = Script(make())
    for _ in range(4):
        script.train(torch.randn(4, 4))
        script.edits.check_places()
        assert not script.edits.lost()


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_a_layer_that_writes_to_its_weight_is_refused_unless_workers_have_their_own(make: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(make(5, 2), make(5, 2, max_norm=1.5))
    with pytest.raises(UsageError, match=r"the layer '1' has max_norm=1\.5, so it writes to its weight .* leave max_norm out"):
        check_layers(model, ())
    check_layers(model, {id(p) for p in model.parameters()})
    check_layers(nn.Sequential(make(5, 2)), ())


def test_looking_at_two_thousand_parameters_takes_no_time_to_speak_of() -> None:
    script = Script(nn.Sequential(*(nn.Linear(2, 2) for _ in range(1000))))
    began = time.perf_counter()
    for _ in range(20):
        script.edits.check_places()
        assert not script.edits.lost()
    assert (time.perf_counter() - began) / 20 < 0.005  # 0.3 ms on a quiet machine


def test_weights_that_a_run_has_already_are_put_back_before_the_first_batch() -> None:
    script, joined = Script(network()), []
    work = SimpleNamespace(edits=script.edits, join=lambda: joined.append(True))
    setup = SimpleNamespace(begins_later=False, begins=False)
    parts: Any = setup, SimpleNamespace(want_all=lambda: None), work
    training = Training(cast(Any, None), *parts, None)
    training.begin()
    assert not joined
    nn.init.zeros_(script.model[0].weight)  # type: ignore[index, arg-type]
    training.begin()
    assert joined
    setup.begins = True
    with pytest.raises(UsageError, match=r"changed '0\.weight' after run\.optimizer\(\)"):
        training.begin()


def test_first_weights_are_sent_when_the_first_batch_is_asked_for() -> None:
    order: list[str] = []
    work = SimpleNamespace(join=lambda: order.append("join"))
    setup = SimpleNamespace(begins_later=True, send_first_weights=lambda: order.append("send"))
    parts: Any = setup, object(), work
    training = Training(cast(Any, None), *parts, None)
    training.begin()
    assert order == ["send", "join"]
