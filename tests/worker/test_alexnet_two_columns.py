"""AlexNet in two columns has the papers' sizes, and is one function whether it is on one device or divided over two."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.models.alexnet_two_columns import (
    PAPER,
    TEXT,
    Convolution,
    ResponseNorm,
    Sizes,
    TwoColumns,
    alexnet,
    parse_devices,
    whole_state,
)
from roundtable.worker.models.builtin import build

sys.path.insert(0, str(Path(__file__).parent))
from test_replica import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

IMAGENET = (3, 224, 224)
TEXT_PADDED = Sizes((replace(TEXT.convolutions[0], padding=2), *TEXT.convolutions[1:]))
#: Everything that the real ones have, and fast.
SMALL = Sizes(
    (
        Convolution(8, 3, padding=1, sees_both=True, norm=True, pool=(3, 2)),
        Convolution(12, 3, padding=1, norm=True, pool=(2, 2)),
        Convolution(16, 3, padding=1, sees_both=True),
        Convolution(16, 3, padding=1),
        Convolution(12, 3, padding=1, pool=(2, 2)),
    ),
    hidden=(20, 14),
)
CPUS = parse_devices("cpu,cpu")


def on_meta(sizes: Sizes) -> nn.Sequential:
    with torch.device("meta"):
        return alexnet(sizes, IMAGENET, 1000)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def ladder(model: nn.Sequential) -> list[int]:
    """The heights of the maps that the convolutions and pools make."""
    maps, found = torch.empty(2, *IMAGENET, device="meta"), []
    for layer in model:
        maps = layer(maps)
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            found.append(maps.shape[-2])
    return found


@pytest.mark.parametrize(
    ("sizes", "count", "sides"),
    [
        (PAPER, 60_965_224, [55, 27, 27, 13, 13, 13, 13, 6]),
        (TEXT, 60_740_968, [55, 27, 27, 13, 13, 13, 13, 6]),
        (TEXT_PADDED, 74_372_456, [56, 28, 28, 14, 14, 14, 14, 7]),
    ],
)
def test_the_networks_have_their_sizes_whole_and_divided(sizes: Sizes, count: int, sides: list[int]) -> None:
    whole = on_meta(sizes)
    assert parameters(whole) == count and ladder(whole) == sides
    meta = parse_devices("meta,meta")
    divided = TwoColumns(whole, meta)
    assert parameters(divided) == count
    assert divided(torch.empty(2, *IMAGENET, device="meta")).shape == (2, 1000)


def test_the_text_s_convolutions_are_a_thirtieth_of_its_parameters() -> None:
    assert sum(parameters(layer) for layer in on_meta(TEXT) if isinstance(layer, nn.Conv2d)) == 2_109_824


@pytest.mark.parametrize("name", ["alexnet-2012", "alexnet-text"])
def test_the_presets_are_built_by_name_and_have_half_of_every_layer_in_each_column(name: str) -> None:
    with torch.device("meta"):
        model = build(name, IMAGENET, 1000, devices="meta,meta")
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
    both = {key.rpartition(".0.")[0]: shape for key, shape in shapes.items() if key.endswith(".0.weight")}
    assert both == {key.rpartition(".1.")[0]: shape for key, shape in shapes.items() if key.endswith(".1.weight")}
    maps = {key.removeprefix("layers."): shape[:2] for key, shape in both.items() if "conv" in key}
    assert maps == {"conv1": (48, 3), "conv2": (128, 48), "conv3": (192, 256), "conv4": (192, 192), "conv5": (128, 192)}
    dense = {key.removeprefix("layers."): shape for key, shape in both.items() if "fc" in key}
    assert dense == {"fc6": (2048, 9216), "fc7": (2048, 4096), "fc8": (500, 4096)}


def two_forms(dtype: torch.dtype, classes: int = 5) -> tuple[nn.Sequential, TwoColumns, Tensor, Tensor]:
    torch.manual_seed(1)
    whole = alexnet(SMALL, (3, 18, 20), classes).to(dtype)
    return whole, TwoColumns(whole, CPUS), torch.randn(6, 3, 18, 20, dtype=dtype), torch.arange(6) % classes


def loss_and_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(2)  # of dropout
    loss = cross_entropy(model(images), labels)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return loss.detach(), gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_whole_and_divided_give_the_same_loss_and_gradients(dtype: torch.dtype, tolerance: float) -> None:
    whole, divided, images, labels = two_forms(dtype)
    loss, gradients = loss_and_gradients(whole, images, labels)
    other, halves = loss_and_gradients(divided, images, labels)
    assert torch.isclose(loss, other, rtol=tolerance, atol=0)
    for name, gradient in gradients.items():
        layer, _, tensor = name.rpartition(".")
        found = torch.cat([halves[f"layers.{layer}.{number}.{tensor}"] for number in (0, 1)])
        assert found.shape == gradient.shape
        assert float((found - gradient).norm()) <= tolerance * float(gradient.norm()), name


def test_dividing_draws_no_random_numbers_and_evaluation_needs_none() -> None:
    torch.manual_seed(1)
    whole = alexnet(SMALL, (3, 18, 20), 5)
    state = torch.get_rng_state()
    divided = TwoColumns(whole, CPUS).eval()
    images = torch.zeros(2, 3, 18, 20)
    assert torch.allclose(divided(images), whole.eval()(images), rtol=1e-6, atol=1e-7)
    assert torch.equal(torch.get_rng_state(), state)


def test_only_layers_that_see_both_columns_let_one_reach_the_other() -> None:
    whole, divided, images, _ = two_forms(torch.float64)
    divided.eval()
    images.requires_grad_()
    second = divided.layers[:8]((images, images.detach() * 1.0))[1]  # up to the second pool
    assert not second.requires_grad or torch.autograd.grad(second.sum(), images, allow_unused=True)[0] is None
    assert whole[8] is whole.conv3
    second = divided.layers[:9]((images, images.detach()))[1]
    assert float(torch.autograd.grad(second.sum(), images)[0].abs().sum()) > 0


@pytest.mark.parametrize("classes", [4, 5])
def test_a_file_of_one_form_is_a_file_of_the_other(classes: int, tmp_path: Path) -> None:
    whole, divided, images, _ = two_forms(torch.float32, classes)
    for parameter in divided.parameters():
        parameter.data.mul_(1.5)
    save_file(divided.state_dict(), tmp_path / "a.safetensors")
    whole.load_state_dict(load_file(tmp_path / "a.safetensors"))
    assert torch.allclose(whole.eval()(images), divided.eval()(images), rtol=1e-5, atol=1e-6)
    save_file(whole.state_dict(), tmp_path / "b.safetensors")
    fresh = TwoColumns(alexnet(SMALL, (3, 18, 20), classes), CPUS)
    fresh.load_state_dict(load_file(tmp_path / "b.safetensors"))
    assert torch.equal(fresh.eval()(images), divided(images))
    with pytest.raises(RuntimeError, match="conv1"):
        fresh.load_state_dict({})


def test_a_checkpoint_s_halves_make_up_the_whole_network() -> None:
    _, divided, _, _ = two_forms(torch.float32)
    halves = {name: parameter.detach() for name, parameter in reversed(list(divided.named_parameters()))}
    found, state = whole_state(halves), divided.state_dict()
    assert found.keys() == state.keys() == whole_state(state).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_each_column_stays_on_its_device_with_cuda_too() -> None:
    """Tensors without memory, which torch checks the devices of, stand in for those of two GPUs."""
    with FakeTensorMode(), torch.no_grad():
        divided = TwoColumns(alexnet(SMALL, (3, 18, 20), 5), (torch.device("cuda", 0), torch.device("cuda", 1)))
        seen: list[tuple[torch.device, torch.device]] = []
        for layer in divided.layers:
            for half in layer.children():
                half.register_forward_hook(
                    lambda module, inputs, output: seen.extend(
                        (inputs[0].device, parameter.device) for parameter in module.parameters()
                    )
                )
        logits = divided(torch.empty(2, 3, 18, 20))
        assert logits.device == torch.device("cuda", 0) and logits.shape == (2, 5)
        assert len(seen) == 2 * 8 * 2 and all(first == second for first, second in seen)
        assert {first.index for first, _ in seen} == {0, 1}
        assert all(tensor.device.index == 0 for tensor in divided.state_dict().values())


@pytest.mark.parametrize("servers", [1, 3])
def test_both_columns_are_trained_through_the_servers_as_the_whole_is_in_plain_torch(servers: int) -> None:
    whole, divided, images, labels = two_forms(torch.float32)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.5, momentum=0.9)
    cluster = Cluster(divided, servers, torch.optim.SGD, lr=0.5, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        loss_and_gradients(whole, images * (step + 1), labels)
        optimizer.step()
        torch.manual_seed(2)
        cluster.round([lambda step=step: cross_entropy(divided(images * (step + 1)), labels)], [6])  # type: ignore[misc]
    state = divided.state_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(state[name], tensor, rtol=1e-5, atol=1e-6), name


def test_workers_of_two_columns_write_a_file_for_the_whole_network(launch: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    flags = [
        "--model",
        "alexnet-text",
        "--data",
        "synthetic",
        "--image",
        "3x33x33",
        "--classes",
        4,
        "--column-devices",
        "cpu,cpu",
    ]
    summary = launch(*flags, "--rounds", 2, "--global-batch", 8, "--micro-batch", 2, "--loss", "mse", "--servers", 1)
    assert summary["rounds"] == 2 and 0 < summary["loss"] < 1  # of four outputs near 0 about 1/4, where cross-entropy is log 4
    whole = build("alexnet-text", (3, 33, 33), 4)
    whole.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    assert bool(torch.isfinite(whole(torch.zeros(1, 3, 33, 33))).all())


@pytest.mark.parametrize(("name", "side"), [("alexnet-text", 33), ("alexnet-2012", 63)])
def test_both_presets_have_the_same_loss_and_gradients_divided_or_not(name: str, side: int) -> None:
    torch.manual_seed(0)
    whole = build(name, (3, side, side), 4).eval()
    divided = TwoColumns(whole, CPUS).eval()
    images, labels = torch.randn(2, 3, side, side), torch.tensor([0, 3])
    losses = []
    for model in (whole, divided):
        losses.append(cross_entropy(model(images), labels))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    found = whole_state({n: p.grad for n, p in divided.named_parameters() if p.grad is not None})
    for key, parameter in whole.named_parameters():
        assert parameter.grad is not None
        assert torch.linalg.vector_norm(found[key] - parameter.grad) <= 1e-5 * torch.linalg.vector_norm(parameter.grad), key


@pytest.mark.long
def test_the_script_of_the_examples_trains_on_a_folder_of_images(launch: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(12):
            Image.new("RGB", (40, 36), colour).save(tmp_path / "images" / name / f"{number}.png")
    script = Path(__file__).parents[2] / "examples" / "two_columns.py"
    flags = ("--model", "alexnet-text", "--side", 33, "--devices", "cpu,cpu", "--epochs", 1)
    summary = launch("--workers", 2, "--servers", 1, script, "--", tmp_path / "images", *flags)
    assert summary["rounds"] >= 1 and summary["accuracy"] is not None
    assert load_file(tmp_path / "run" / "model.safetensors")["conv1.weight"].shape == (96, 3, 5, 5)


def test_response_normalisation_is_the_paper_s() -> None:
    """b = a / (k + alpha * sum of a^2 over 5 neighbours)^beta, with k = 2, alpha = 1e-4 and beta = 0.75, within a column."""
    maps = torch.randn(2, 12, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 40
    found = ResponseNorm(columns=2)(maps)
    for i in range(12):
        column = i // 6 * 6
        near = maps[:, max(i - 2, column) : min(i + 3, column + 6)]
        assert torch.allclose(found[:, i], maps[:, i] / (2 + 1e-4 * near.square().sum(1)) ** 0.75)


@pytest.mark.parametrize(
    ("devices", "sentence"),
    [
        ("cpu", "need two devices"),
        ("cpu,cpu,cpu", "need two devices"),
        ("cpu,abacus", "'abacus'"),
        ("cuda:98,cuda:99", "'cuda:98'"),
    ],
)
def test_devices_that_cannot_be_used_are_named(devices: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        build("alexnet-text", (3, 64, 64), 10, devices)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_model_without_columns_is_not_divided() -> None:
    with pytest.raises(UsageError, match=r"lenet.*alexnet-2012 and alexnet-text"):
        build("lenet", (3, 64, 64), 10, "cpu,cpu")
