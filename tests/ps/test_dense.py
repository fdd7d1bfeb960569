"""torch.optim on the servers' slices gives the bits of the same torch.optim on whole tensors in plain PyTorch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from roundtable.common.codecs.registry import for_pushes
from roundtable.common.config.settings import Settings
from roundtable.common.model.layout import CHUNK_BYTES, make_layout
from roundtable.common.model.partial_sum import Sum, put_off
from roundtable.common.model.reduction_tree import fold
from roundtable.common.model.tensor_bytes import dtype_name, to_frame
from roundtable.common.policies import load
from roundtable.common.protocol.messages.setup import Update
from roundtable.common.protocol.model_spec import Rule, TensorSpec
from roundtable.common.runtime.errors import UsageError, WireError
from roundtable.common.storage import tensor_file
from roundtable.common.storage.tensor_file import TensorFiles
from roundtable.ps.params.dense import DenseParameters, NotFinite
from roundtable.worker.client.dense.compression import WeightDecoder
from roundtable.worker.optim.optimizer import example_optimizer, is_whole, plain_settings

pytestmark = pytest.mark.usefixtures("one_thread")

#: Shape and parameter group of each of the model's tensors; the second is larger than a chunk.
MODEL: list[tuple[tuple[int, ...], int]] = [((3, 5), 0), ((1100, 1000), 0), ((7,), 1), ((), 1), ((2, 33), 0), ((5, 5), 1)]
#: For each step, the tensors that get no gradient: never the last, not at first the first, and others in between.
ABSENT = [{0, 5}, {0, 2, 5}, {1, 5}, {0, 3, 4, 5}]
STEPS = len(ABSENT)
#: A power of two, so that multiplying a gradient by it and dividing the sum by it again changes no bit.
SAMPLES = 4

Tensors = list[torch.Tensor]
Gradients = Sequence[torch.Tensor | None]


class Cluster:
    """The stores of all servers, fed and read as whole tensors."""

    def __init__(
        self, tensors: Tensors, groups: list[int], update: Update, servers: int, rule: Rule = "mean", **settings: Any
    ) -> None:
        specs = [
            TensorSpec(str(i), list(t.shape), dtype_name(t.dtype), group, rule)
            for i, (t, group) in enumerate(zip(tensors, groups, strict=True))
        ]
        self.layout = make_layout(specs, servers)
        policy = load(Settings(**settings))
        self.stores = [DenseParameters(self.layout, number, update, policy) for number in range(servers)]
        self.clips = update.clip_norm is not None
        for chunk in self.layout.chunks:
            parts = [tensors[p.tensor].detach().reshape(-1)[p.start : p.start + p.length] for p in chunk.pieces]
            self.stores[chunk.server].load(chunk.id, to_frame(torch.cat(parts)))

    def receive(self, gradients: Gradients, samples: int) -> dict[int, Sum]:
        """One micro-batch's contribution, by chunk, as it comes in over the wire."""
        out = {}
        for chunk in self.layout.chunks:
            flat = torch.zeros(chunk.numel, dtype=getattr(torch, chunk.sum_dtype))
            present = 0
            for bit, p in enumerate(chunk.pieces):
                gradient = gradients[p.tensor]
                if gradient is not None:
                    weighted = gradient.to(flat.dtype) * (1 if chunk.kind == "max" else samples)
                    flat[p.offset : p.offset + p.length] = weighted.reshape(-1)[p.start : p.start + p.length]
                    present |= 1 << bit
            out[chunk.id] = self.stores[chunk.server].receive(chunk.id, bytes(to_frame(flat)), present)
        return out

    def step(self, gradients: Gradients, hypers: Sequence[dict[str, Any]] = ({}, {}), **how: Any) -> None:
        """One round of one micro-batch."""
        self.apply(self.receive(gradients, SAMPLES), SAMPLES, hypers, **how)

    def apply(self, totals: dict[int, Sum], samples: int, hypers: Sequence[dict[str, Any]] = ({}, {}), **how: Any) -> None:
        stores = {chunk.id: self.stores[chunk.server] for chunk in self.layout.chunks}
        if self.clips:
            totals, samples = {i: stores[i].mean(i, [total], samples) for i, total in totals.items()}, 1
        norms = sorted(norm for i, mean in totals.items() for norm in stores[i].norms(i, mean)) if self.clips else []
        for chunk in self.layout.chunks:
            factor = stores[chunk.id].clipping.factor(norms)
            group = hypers[chunk.group] if chunk.group >= 0 else {}
            stores[chunk.id].apply(chunk.id, [totals[chunk.id]], samples, group, factor, **how)

    def weights(self) -> Tensors:
        """All tensors, from the bytes that workers would be sent."""
        out = [torch.zeros(spec.numel, dtype=getattr(torch, spec.dtype)) for spec in self.layout.tensors]
        for chunk in self.layout.chunks:
            flat = self.stores[chunk.server].publish(chunk.id)
            for p in chunk.pieces:
                out[p.tensor][p.start : p.start + p.length] = flat[p.offset : p.offset + p.length]
        return [flat.view(spec.shape) for flat, spec in zip(out, self.layout.tensors, strict=True)]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape, _ in MODEL]


def gradients_of(step: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(100 + step)
    values = [torch.randn(shape, generator=generator).to(dtype) * scale for shape, _ in MODEL]
    return [None if i in ABSENT[step] else value for i, value in enumerate(values)]


def group_dicts(params: Sequence[torch.Tensor], second: dict[str, Any]) -> list[dict[str, Any]]:
    """The model's two parameter groups, the second with settings of its own."""
    first, other = ([p for p, (_, group) in zip(params, MODEL, strict=True) if group == number] for number in (0, 1))
    return [{"params": first}, {"params": other, **second}]


def make(
    cls: Any, hyper: dict[str, Any], second: dict[str, Any], servers: int, dtype: torch.dtype = torch.float32, **how: Any
) -> tuple[list[nn.Parameter], torch.optim.Optimizer, Cluster]:
    """The same model twice: plain parameters with their optimizer, and a cluster's stores."""
    plain = parameters(dtype)
    update = Update(cls.__name__, plain_settings(example_optimizer(cls, group_dicts(plain, second), hyper)), **how)
    cluster = Cluster([p.detach() for p in plain], [group for _, group in MODEL], update, servers)
    return plain, cls(group_dicts(plain, second), **hyper), cluster


def plain_step(params: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer, gradients: Gradients) -> None:
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = None if gradient is None else gradient.clone()
    optimizer.step()


def same(ours: Sequence[torch.Tensor], plain: Sequence[torch.Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(ours, plain, strict=True)]


# ---- every optimizer


def elementwise() -> Iterator[Any]:
    for cls in vars(torch.optim).values():
        if inspect.isclass(cls) and cls is not torch.optim.Optimizer:
            try:
                if not is_whole(cls, {}):
                    yield cls
            except UsageError:
                continue


#: Settings that change what a class computes, and so are tried beside its defaults.
SPECIAL: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ],
    "Adam": [{"amsgrad": True}, {"betas": (0.5, 0.9), "eps": 1e-3}, {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "AdamW": [{"amsgrad": True, "weight_decay": 0.3}],
    "RMSprop": [{"centered": True}, {"momentum": 0.9, "centered": True}],
    "Rprop": [{"etas": (0.3, 1.5), "step_sizes": (1e-5, 0.1)}],
    "Adagrad": [{"lr_decay": 0.1, "initial_accumulator_value": 0.1}],
    "Adadelta": [{"rho": 0.8}],
    "ASGD": [{"t0": 1.0, "lambd": 0.1}],
    "NAdam": [{"momentum_decay": 0.1}, {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "RAdam": [{"betas": (0.5, 0.6)}, {"decoupled_weight_decay": True, "weight_decay": 0.1}],
}
GENERAL: list[dict[str, Any]] = [{"weight_decay": 0.05}, {"maximize": True}, {"foreach": True}, {"fused": True}]


def recipes() -> Iterator[Any]:
    for cls in elementwise():
        known = inspect.signature(cls).parameters
        general = [hyper for hyper in GENERAL if all(key in known for key in hyper)]
        for hyper in [{}, *general, *SPECIAL.get(cls.__name__, [])]:
            yield pytest.param(cls, hyper, id=f"{cls.__name__}-{'-'.join(hyper) or 'defaults'}")


def test_the_optimizers_that_are_tested_include_all_that_are_well_known() -> None:
    names = {cls.__name__ for cls in elementwise()}
    assert names >= {"SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adagrad", "Adadelta", "ASGD"}
    assert names >= set(SPECIAL)


@pytest.mark.parametrize(("cls", "hyper"), [*recipes()])
def test_weights_are_those_of_plain_torch_bit_for_bit(cls: Any, hyper: dict[str, Any]) -> None:
    plain, optimizer, cluster = make(cls, {"lr": 0.02, **hyper}, {"lr": 0.005}, servers=3)
    assert len([chunk for chunk in cluster.layout.chunks if any(p.tensor == 1 for p in chunk.pieces)]) == 2
    before = [p.detach().clone() for p in plain]
    for step in range(STEPS):
        plain_step(plain, optimizer, gradients_of(step))
        cluster.step(gradients_of(step))
        assert all(same(cluster.weights(), plain)), f"after step {step}"
    assert same(plain, before) == [False] * 5 + [True]


@pytest.mark.parametrize("cls", list(elementwise()))
def test_a_checkpoint_on_another_number_of_servers_goes_on_to_the_same_bits(cls: Any, tmp_path: Path) -> None:
    hyper = {"lr": 0.02, **SPECIAL.get(cls.__name__, [{}])[0]}
    plain, optimizer, cluster = make(cls, hyper, {"lr": 0.005}, servers=3)
    for step in range(STEPS):
        if step == STEPS // 2:
            cluster = moved(cluster, make(cls, hyper, {"lr": 0.005}, servers=2)[2], tmp_path)
        plain_step(plain, optimizer, gradients_of(step))
        cluster.step(gradients_of(step))
        assert all(same(cluster.weights(), plain)), f"after step {step}"


@pytest.mark.parametrize("hyper", [{"momentum": 0.9}, {"weight_decay": 0.1, "maximize": True}, {"fused": True}])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_who_divides_a_sum_as_it_is_read_does_so_to_the_same_bits(cls: Any, hyper: dict[str, Any], dtype: torch.dtype) -> None:
    if cls is torch.optim.Adam:
        hyper = {key: value for key, value in hyper.items() if key != "momentum"}
    plain, optimizer, cluster = make(cls, {"lr": 0.02, **hyper}, {"lr": 0.005}, 2, dtype)
    divided = [part.divides(block) for store in cluster.stores for part in store._parts.values() for block in part.blocks]
    assert any(divided) == (cls is torch.optim.SGD or "fused" in hyper)
    for step in range(STEPS):
        left, right = gradients_of(step, dtype), gradients_of((step + 1) % STEPS, dtype)
        pairs = list(zip(left, right, strict=True))
        added = [(0 if a is None else a * 3) + (0 if b is None else b * 4) for a, b in pairs]
        means = [None if a is None and b is None else total / 7 for (a, b), total in zip(pairs, added, strict=True)]
        plain_step(plain, optimizer, means)
        three, four = cluster.receive(left, 3), cluster.receive(right, 4)
        cluster.apply({chunk: put_off(three[chunk], four[chunk]) for chunk in three}, 7)
        assert all(same(cluster.weights(), plain)), f"after step {step}"


def moved(old: Cluster, new: Cluster, folder: Path) -> Cluster:
    """`new` with the state of `old`, by way of files."""
    paths = [folder / f"{number}.safetensors" for number in range(len(old.stores))]
    for path, store in zip(paths, old.stores, strict=True):
        tensor_file.write(path, store.state({}), {})
    for store in new.stores:
        store.restore(TensorFiles(paths))
    return new


@pytest.mark.parametrize("servers", [1, 2, 7])
def test_weights_do_not_depend_on_the_number_of_servers(servers: int) -> None:
    plain, optimizer, cluster = make(torch.optim.AdamW, {"lr": 0.02}, {"weight_decay": 0.5}, servers)
    for step in range(STEPS):
        plain_step(plain, optimizer, gradients_of(step))
        cluster.step(gradients_of(step))
    assert all(same(cluster.weights(), plain))


def test_a_tensor_without_a_gradient_gets_no_state_no_decay_and_no_momentum() -> None:
    hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}
    plain, optimizer, cluster = make(torch.optim.SGD, hyper, {}, servers=1)
    for step, moves in ((0, [False, True]), (1, [False, True]), (2, [True, False])):
        before = cluster.weights()
        plain_step(plain, optimizer, gradients_of(step))
        cluster.step(gradients_of(step))
        assert [not torch.equal(before[i], cluster.weights()[i]) for i in (0, 1)] == moves
    parts = [part for store in cluster.stores for part in store._parts.values()]
    stated = {
        p.tensor for part in parts for bit, p in enumerate(part.chunk.pieces) for b, *_ in part._within(bit) if part.state_of(b)
    }
    assert stated == {i for i, p in enumerate(plain) if p in optimizer.state}


def test_small_tensors_are_updated_as_one_until_one_of_them_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [10, 64, 3, 100, 7]
    plain = [nn.Parameter(torch.randn(size)) for size in sizes]
    update = Update("Adam", plain_settings(example_optimizer(torch.optim.Adam, [{"params": plain}], {})))
    cluster, optimizer = Cluster(plain, [0] * len(sizes), update, servers=1), torch.optim.Adam(plain)
    stepped: list[int] = []
    real = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self: stepped.append(len(self.param_groups[0]["params"][0])) or real(self)
    )
    for absent, lengths in ((-1, [184]), (-1, [184]), (2, [74, 107]), (-1, [74, 3, 107]), (0, [64, 3, 107])):
        gradients = [None if i == absent else torch.randn(size) for i, size in enumerate(sizes)]
        stepped.clear()
        cluster.step(gradients, [{}])
        assert stepped == lengths
        for p, gradient in zip(plain, gradients, strict=True):
            p.grad = gradient
        real(optimizer)
        assert all(same(cluster.weights(), plain))


KERNELS = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.Adam, {"weight_decay": 0.1}),
    (torch.optim.Adam, {"fused": True}),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
]
MASKS = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=5)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(MASKS, st.sampled_from(KERNELS), st.integers(1, 3), st.sets(st.integers(1, 4)), st.integers(0, 9))
def test_whatever_is_absent_when_the_bits_are_those_of_plain_torch(
    tmp_path: Path, masks: list[list[bool]], kernel: tuple[Any, Any], servers: int, restored: set[int], seed: int
) -> None:
    """`restored`: before these steps all goes on from a checkpoint."""
    torch.manual_seed(seed)
    cls, hyper = kernel
    sizes = [130, 5, 1, 64, 33, 200]
    plain = [nn.Parameter(torch.randn(size)) for size in sizes]
    update = Update(cls.__name__, plain_settings(example_optimizer(cls, [{"params": plain}], hyper)))
    cluster, optimizer = Cluster(plain, [0] * len(sizes), update, servers), cls(plain, **hyper)
    for step, mask in enumerate(masks):
        if step in restored:
            servers = servers % 3 + 1
            zeros = [torch.zeros(size) for size in sizes]
            cluster = moved(cluster, Cluster(zeros, [0] * len(sizes), update, servers), tmp_path)
        gradients = [torch.randn(size) if is_there else None for is_there, size in zip(mask, sizes, strict=True)]
        plain_step(plain, optimizer, gradients)
        cluster.step(gradients, [{}])
        assert all(same(cluster.weights(), plain))


# ---- settings of a round


def test_settings_sent_with_a_round_override_the_groups_and_stay() -> None:
    plain, optimizer, cluster = make(torch.optim.AdamW, {"lr": 0.02}, {"lr": 0.005}, servers=2)
    for step, sent in enumerate([[{}, {}], [{"lr": 0.1, "betas": [0.5, 0.6]}, {"lr": 0.2}], [{}, {"lr": 0.3}]]):
        for group, hyper in zip(optimizer.param_groups, sent, strict=True):
            group.update({key: tuple(v) if isinstance(v, list) else v for key, v in hyper.items()})
        plain_step(plain, optimizer, gradients_of(step))
        cluster.step(gradients_of(step), sent)
        assert all(same(cluster.weights(), plain))


def test_the_learning_rate_can_be_scaled_for_one_push() -> None:
    plain, optimizer, cluster = make(torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}, {"lr": 0.005}, servers=2)
    for step, scale in enumerate([1.0, 0.25, 1.0]):
        for group, rate in zip(optimizer.param_groups, (0.02, 0.005), strict=True):
            group["lr"] = rate * scale
        plain_step(plain, optimizer, gradients_of(step))
        cluster.step(gradients_of(step), lr_scale=scale)
        assert all(same(cluster.weights(), plain))


def test_a_late_gradient_is_compensated_for_what_the_weights_have_done_since() -> None:
    update = Update("SGD", [{"lr": 0.5}])
    start, gradient = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0])
    cluster = Cluster([start], [0], update, 1, policy="async", delay_compensation=0.5)
    then = cluster.stores[0].publish(0)
    cluster.step([gradient])
    now = cluster.weights()[0]
    cluster.step([gradient], then=then)
    assert torch.equal(cluster.weights()[0], now - 0.5 * (gradient + 0.5 * gradient * gradient * (now - start)))


# ---- precision


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_rounded_from_masters_in_single_precision(dtype: torch.dtype, cls: Any) -> None:
    _, _, cluster = make(cls, {"lr": 1e-4}, {"lr": 1e-5}, servers=3, dtype=dtype)
    masters = [p.detach().float() for p in parameters(dtype)]
    optimizer = cls(group_dicts(masters, {"lr": 1e-5}), lr=1e-4)
    for step in range(STEPS):
        gradients = gradients_of(step, dtype)
        plain_step(masters, optimizer, [None if g is None else g.float() for g in gradients])
        cluster.step(gradients)
        assert all(same(cluster.weights(), [master.to(dtype) for master in masters]))
    coarse = parameters(dtype)
    without_masters = cls(group_dicts(coarse, {"lr": 1e-5}), lr=1e-4)
    for step in range(STEPS):
        plain_step(coarse, without_masters, gradients_of(step, dtype))
    assert not all(same(cluster.weights(), coarse))


def test_double_precision_is_kept() -> None:
    plain, optimizer, cluster = make(torch.optim.Adam, {"lr": 0.02}, {}, servers=2, dtype=torch.float64)
    for step in range(STEPS):
        plain_step(plain, optimizer, gradients_of(step, torch.float64))
        cluster.step(gradients_of(step, torch.float64))
    assert all(same(cluster.weights(), plain))


# ---- clipping


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip_norm", [0.01, 3.0, 1e6])
def test_clipping_over_several_servers_has_the_bits_of_clip_grad_norm(clip_norm: float, dtype: torch.dtype) -> None:
    plain, optimizer, cluster = make(torch.optim.SGD, {"lr": 0.1}, {}, servers=3, dtype=dtype, clip_norm=clip_norm)
    for step in range(STEPS):
        gradients = [None if i == 1 else g for i, g in enumerate(gradients_of(step, dtype))]  # without the cut tensor
        for p, gradient in zip(plain, gradients, strict=True):
            p.grad = None if gradient is None else gradient.clone()
        nn.utils.clip_grad_norm_(plain, clip_norm)
        optimizer.step()
        cluster.step(gradients)
        assert all(same(cluster.weights(), plain))


def test_clipping_with_a_tensor_that_is_cut_is_right_to_rounding() -> None:
    plain, optimizer, cluster = make(torch.optim.SGD, {"lr": 1.0}, {}, servers=3, clip_norm=1.0)
    for p, gradient in zip(plain, gradients_of(0), strict=True):
        p.grad = gradient
    nn.utils.clip_grad_norm_(plain, 1.0)
    optimizer.step()
    before = [p.detach() for p in parameters()]
    cluster.step(gradients_of(0))
    moved = torch.cat([(a - b).reshape(-1) for a, b in zip(cluster.weights(), before, strict=True)])
    assert abs(float(moved.double().norm()) - 1.0) < 1e-5
    for ours, theirs in zip(cluster.weights(), plain, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)


def test_a_round_in_which_nothing_has_a_gradient_is_not_clipped_and_changes_nothing() -> None:
    plain, _, cluster = make(torch.optim.AdamW, {"lr": 0.1}, {}, servers=2, clip_norm=1.0)
    cluster.step([None] * len(MODEL))
    assert all(same(cluster.weights(), plain))


# ---- buffers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_buffers_become_their_sample_weighted_mean(dtype: torch.dtype) -> None:
    start = torch.zeros(5, dtype=dtype)
    cluster = Cluster([start], [-1], Update("SGD", []), 1)
    values = [torch.tensor([1.0, -2.0, 0.5, 8.0, 3.0], dtype=dtype) * n for n in (1, 2, 3)]
    leaves = {k: cluster.receive([value], samples) for k, (value, samples) in enumerate(zip(values, (2, 3, 5), strict=True))}
    add = cluster.stores[0].adder(0)
    cluster.apply({0: fold({k: leaf[0] for k, leaf in leaves.items()}, 3, add)}, 10)
    wide = [value.double() for value in values]
    assert torch.equal(cluster.weights()[0], ((wide[0] * 2 + wide[1] * 3 + wide[2] * 5) / 10).to(dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_buffers_become_their_maximum_whatever_the_samples(dtype: torch.dtype) -> None:
    high = (1 << 62) + 1 if dtype == torch.int64 else 1
    values = [torch.tensor([high, 0, 0, 1]).to(dtype), torch.tensor([0, 0, 1, 1]).to(dtype)]
    cluster = Cluster([torch.zeros(4).to(dtype)], [-1], Update("SGD", []), 1, "max")
    left, right = (cluster.receive([value], samples)[0] for value, samples in zip(values, (7, 3), strict=True))
    cluster.apply({0: cluster.stores[0].adder(0)(left, right)}, 10)
    assert cluster.weights()[0].tolist() == torch.tensor([high, 0, 1, 1]).to(dtype).tolist()


@pytest.mark.parametrize(("tensor", "step", "value"), [(0, 2, float("nan")), (1, 0, float("-inf"))])
def test_a_mean_that_is_not_finite_is_refused_by_the_name_of_its_tensor_unless_it_is_allowed(
    tensor: int, step: int, value: float
) -> None:
    gradients = gradients_of(step)
    changed = gradients[tensor]
    assert changed is not None
    changed.view(-1)[-1] = value
    groups = [{"lr": 0.1}, {"lr": 0.1}]
    weights = [p.detach() for p in parameters()]
    allows, fails = (
        Cluster(weights, [group for _, group in MODEL], Update("SGD", groups), 1, on_nonfinite=what) for what in ("allow", "fail")
    )
    allows.step(gradients)
    assert not allows.weights()[tensor].isfinite().all()
    with pytest.raises(NotFinite, match=f"^{tensor}$"):
        fails.step(gradients)


def test_without_an_optimizer_the_mean_replaces_the_weights() -> None:
    cluster = Cluster([torch.zeros(3)], [0], Update(None, [{}]), 1)
    cluster.step([torch.tensor([1.0, 2.0, 3.0])])
    assert cluster.weights()[0].tolist() == [1.0, 2.0, 3.0]


# ---- frames


def test_weights_that_were_handed_out_are_not_touched_by_later_updates() -> None:
    cluster = Cluster([torch.ones(3)], [0], Update("SGD", [{"lr": 0.5}]), 1)
    frame = cluster.stores[0].publish(0)
    before = bytes(to_frame(frame))
    cluster.step([torch.ones(3)])
    assert bytes(to_frame(frame)) == before != bytes(to_frame(cluster.stores[0].publish(0)))


@pytest.mark.parametrize("present", [-1, 4, 1 << 70])
def test_a_contribution_that_names_pieces_the_chunk_lacks_is_refused(present: int) -> None:
    cluster = Cluster([torch.ones(3), torch.ones(2)], [0, 0], Update("SGD", [{"lr": 0.5}]), 1)
    with pytest.raises(WireError, match="2 pieces"):
        cluster.stores[0].receive(0, bytes(20), present)


@pytest.mark.parametrize("size", [0, 19, 21, CHUNK_BYTES])
def test_frames_of_another_size_are_refused_and_change_nothing(size: int) -> None:
    cluster = Cluster([torch.ones(3), torch.ones(2)], [0, 0], Update("SGD", [{"lr": 0.5}]), 1)
    for call in (lambda: cluster.stores[0].receive(0, bytes(size), 1), lambda: cluster.stores[0].load(0, bytes(size))):
        with pytest.raises(WireError, match=f"chunk 0 has {size} bytes, but must have 20"):
            call()
    assert torch.equal(cluster.weights()[0], torch.ones(3))


# ---- codecs


class Coded:
    """A server with one layer, its weights in two weight buffers by turns, and a worker that gets them in frames."""

    def __init__(self, codec: str, lr: float = 0.1) -> None:
        settings = Settings(on_nonfinite="allow", compress_weights=codec)  # type: ignore[arg-type]
        specs = [TensorSpec("weight", [300, 40], "float32", 0), TensorSpec("bias", [300], "float32", 0)]
        self.layout = make_layout(specs, 1)
        self.numel = self.layout.chunks[0].numel
        self.store = DenseParameters(self.layout, 0, Update("SGD", [{"lr": lr, "momentum": 0.9}]), load(settings))
        self.worker = WeightDecoder(settings, self.layout)
        self.weight_buffers = [torch.empty(self.numel) for _ in range(2)]
        self.version = 0

    def start(self, weights: torch.Tensor) -> None:
        self.store.load(0, to_frame(weights))
        self._send(self.store.place(0, self.weight_buffers[0]))

    def step(self, gradient: torch.Tensor) -> None:
        before = self.handed_out
        self.version += 1
        self._send(self.store.apply(0, [Sum(gradient, 0b11)], 1, {}, into=self.handed_out, before=before))

    def stand_still(self) -> None:
        """A round in which the masters do not move."""
        before = self.handed_out
        self.version += 1
        self._send(self.store.place(0, self.handed_out, before))

    def _send(self, frame: memoryview | None) -> None:
        self.frame = frame
        self.worker.begin()
        found = bytes(to_frame(self.handed_out) if frame is None else frame)
        weights = self.worker.weights(self.version, 0, found, is_coded=frame is not None)
        self.worker.got_all({0: self.version})
        self.held = torch.frombuffer(bytearray(weights), dtype=torch.float32)

    @property
    def handed_out(self) -> torch.Tensor:
        """The weights from which workers that share memory compute."""
        return self.weight_buffers[self.version % 2]


def gradient(step: int, numel: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("codec", ["bf16", "fp16", "int8", "onebit"])
def test_what_workers_are_sent_is_to_the_bit_what_they_would_read_and_the_masters_do_not_drift(codec: str) -> None:
    coded, plain = Coded(codec), Coded("none")
    first = gradient(-1, coded.numel)
    coded.start(first)
    plain.start(first)
    for step in range(40):
        coded.step(gradient(step, coded.numel))
        plain.step(gradient(step, coded.numel))
        assert coded.frame is not None and len(coded.frame) < 2.2 * coded.numel
        assert torch.equal(coded.held, coded.handed_out)
        assert torch.equal(coded.store.master(0), plain.handed_out)
        assert not torch.equal(coded.handed_out, plain.handed_out)


@pytest.mark.parametrize(("codec", "rounds", "at_most"), [("int8", 3, 1e-6), ("onebit", 100, 0.05)])
def test_weights_sent_as_changes_come_to_the_masters_when_these_stand_still(codec: str, rounds: int, at_most: float) -> None:
    coded = Coded(codec)
    coded.start(torch.zeros(coded.numel))
    for step in range(5):
        coded.step(gradient(step, coded.numel))
    for _ in range(rounds):
        coded.stand_still()
    assert torch.equal(coded.held, coded.handed_out)
    assert (coded.handed_out - coded.store.master(0)).norm() < at_most * coded.store.master(0).norm()


@pytest.mark.parametrize("codec", ["bf16", "int8"])
@pytest.mark.parametrize("place", [0, -1])
def test_weights_that_are_not_finite_are_sent_as_they_are_and_do_not_stay(codec: str, place: int) -> None:
    """The last elements are a bias, which a codec leaves alone."""
    coded = Coded(codec, lr=1.0)
    coded.start(torch.ones(coded.numel))
    bad = torch.zeros(coded.numel)
    bad[place] = -float("inf")
    coded.step(bad)
    assert torch.equal(coded.held, coded.store.master(0)) and coded.held[place] == float("inf")
    coded.store.load(0, to_frame(torch.ones(coded.numel)))
    coded.stand_still()
    coded.stand_still()
    assert torch.equal(coded.held, torch.ones(coded.numel))


def test_first_weights_are_rounded_too() -> None:
    coded = Coded("bf16")
    weights = gradient(0, coded.numel)
    coded.start(weights)
    assert torch.equal(coded.handed_out[:12000], weights[:12000].bfloat16().float())
    assert torch.equal(coded.handed_out[12000:], weights[12000:])
    assert torch.equal(coded.store.publish(0), coded.handed_out) and torch.equal(coded.store.master(0), weights)


def test_a_coded_contribution_is_decoded_into_memory_that_sums_may_use() -> None:
    settings = Settings(compress_gradients="int8")
    layout = Coded("none").layout
    store = DenseParameters(layout, 0, Update("SGD", [{"lr": 0.1}]), load(settings))
    codec = for_pushes(settings, layout)
    assert codec is not None
    values = gradient(0, layout.chunks[0].numel)
    coded = codec.encode(0, values, 5, None)
    assert coded is not None
    found = store.decode(0, bytes(to_frame(coded.frame)), 0b11, 5)
    assert found.owned and found.scale == 1.0 and found.present == 0b11
    torch.testing.assert_close(found.values, values, rtol=0, atol=0.05)
    for frame, present in ((bytes(7), 1), (bytes(to_frame(coded.frame)), 4)):
        with pytest.raises(WireError):
            store.decode(0, frame, present, 5)
    with pytest.raises(WireError, match="coded in a run without a codec"):
        Coded("none").store.decode(0, bytes(to_frame(coded.frame)), 1, 5)


def test_sums_that_are_put_off_within_each_other_come_to_the_same_on_either_side() -> None:
    tensors = [torch.zeros(5)]
    cluster = Cluster(tensors, [0], Update("SGD", [{"lr": 1.0}]), 1)
    (chunk,) = cluster.layout.chunks
    a, b, c, d = (cluster.receive([torch.full((5,), value)], 1)[chunk.id] for value in (1.0, 2.0, 3.0, 4.0))
    sides = put_off(a, put_off(b, put_off(c, d))), put_off(put_off(put_off(a, b), c), d), put_off(put_off(a, b), put_off(c, d))
    for total in sides:
        store = Cluster(tensors, [0], Update("SGD", [{"lr": 1.0}]), 1).stores[0]
        assert torch.equal(store.mean(chunk.id, [total], 4).values, torch.full((5,), 2.5))
