"""The costs of layers are those of a calculation by hand, and the command shows them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from roundtable import cli
from roundtable.cluster.run.exit_codes import run_command
from roundtable.common.runtime.errors import UsageError
from roundtable.worker.layers.sharded_linear import ColumnParallelLinear, ShardedLinear
from roundtable.worker.models.builtin import build
from roundtable.worker.tools.layer_costs import LayerCost, Weights, costs, inspect, layers

BIASES = 96 + 256 + 384 + 384 + 256 + 4096 + 4096 + 1000
FILE = """
from torch import nn
def small():
    return nn.Conv2d(3, 12, 5, padding=2)
def odd(size):
    ...
def not_one():
    return {}
"""


def one(layer: nn.Module, *shape: int) -> LayerCost:
    [cost] = layers(layer.to("meta"), shape)
    return cost


def test_a_million_hidden_units_on_a_million_pixels_need_less_the_less_they_see_and_the_more_they_share() -> None:
    assert costs(inputs=1000 * 1000, positions=10**6, maps=1, field=10 * 10) == Weights(full=10**12, local=10**8, shared=100)


def test_thirty_two_filters_of_10x10_have_3200_weights() -> None:
    assert costs(inputs=10**6, positions=10**6, maps=32, field=100).shared == 3200
    cost = one(nn.Conv2d(1, 32, 10), 1, 100, 100)
    assert cost.weights == Weights(full=10**4 * 32 * 91 * 91, local=100 * 32 * 91 * 91, shared=3200) and cost.parameters == 3232


def test_four_channels_to_two_with_filters_of_2x2_have_32_weights() -> None:
    cost = one(nn.Conv2d(4, 2, 2, bias=False), 4, 3, 3)
    assert cost.weights == Weights(full=36 * 8, local=16 * 8, shared=32)
    assert (cost.output, cost.parameters, cost.multiply_adds) == ((2, 2, 2), 32, 128)


def test_four_hundred_features_of_8x8_on_96x96_have_3168400_outputs() -> None:
    cost = one(nn.Conv2d(1, 400, 8), 1, 96, 96)
    assert cost.output == (400, 89, 89) and cost.multiply_adds == 3_168_400 * 64


@pytest.mark.parametrize("layer", [ShardedLinear(20, 50, bias=True), ColumnParallelLinear(20, 50)])
def test_a_layer_on_the_servers_costs_what_a_linear_one_does(layer: nn.Module) -> None:
    with torch.device("meta"):
        found, expected = (layers(nn.Sequential(nn.Linear(8, 20), one), (8,)) for one in (layer, nn.Linear(20, 50)))
    assert found == [expected[0], replace(expected[1], kind=type(layer).__name__)]
    assert (found[1].output, found[1].parameters, found[1].multiply_adds) == ((50,), 1050, 1000)
    assert "forward" not in vars(layer)  # it is as it was


def test_a_filter_of_a_column_sees_half_the_maps() -> None:
    cost = one(nn.Conv2d(8, 6, 3, groups=2), 8, 5, 5)
    assert cost.weights == Weights(full=200 * 54, local=4 * 9 * 54, shared=4 * 9 * 6)


def test_a_fully_connected_layer_costs_the_same_each_way() -> None:
    cost = one(nn.Linear(30, 20), 30)
    assert cost.weights == Weights(600, 600, 600) and (cost.parameters, cost.multiply_adds) == (620, 600)


def test_the_layers_of_a_model_come_in_their_order_and_parameters_used_twice_count_once() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 4)
            self.first = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.first(x)).mean((2, 3))
            y: torch.Tensor = self.last(self.last(x))
            return y

    model = Net().to("meta")
    found = layers(model, (3, 5, 5))
    assert [(layer.name, layer.module, layer.parameters, layer.multiply_adds) for layer in found] == [
        ("conv1", "first", 112, 972),
        ("bn1", "norm", 8, 0),
        ("fc1", "last", 20, 16),
        ("fc1", "last", 0, 16),
    ]
    assert model.training and not model.first._forward_hooks


def test_the_sums_of_alexnet_are_its_own() -> None:
    with torch.device("meta"):
        found = layers(build("alexnet-text", (3, 224, 224), 1000), (3, 224, 224))
    assert sum(layer.parameters for layer in found) == 60_740_968
    weights = [layer.weights for layer in found if layer.weights is not None]
    assert (len(weights), sum(w.shared for w in weights)) == (8, 60_740_968 - BIASES)


def shown(name: str, image: str | None = None, data: str | None = None, classes: int | None = None) -> list[str]:
    console = Console(width=150)
    with console.capture() as capture:
        inspect(name, image, data, None, classes, console)
    return capture.get().splitlines()


@pytest.fixture
def model_file(tmp_path: Path) -> str:
    path = tmp_path / "net.py"
    path.write_text(FILE)
    return str(path)


def test_the_command_prints_a_line_a_layer_and_their_sums(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(cli.cli, ["inspect", "lenet", "--data", "digits"], "launch.py") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "lenet on an image of 1x8x8, 10 classes"
    assert lines[2].split() == ["conv1", "0", "Conv2d", "16x8x8", "416", "25,600", "400", "25,600", "65,536"]
    assert lines[14].split()[:2] == ["sum", "39,742"]
    assert "1,000,000,000,000 weights" in (text := " ".join(" ".join(lines[15:]).split())) and "100,000,000 if" in text


def test_a_model_of_a_file_is_shown_on_the_image_asked_for(model_file: str) -> None:
    lines = shown(f"{model_file}:small", image="3x32x32")
    assert lines[0] == f"{model_file}:small on an image of 3x32x32" and "12x32x32" in lines[2]


@pytest.mark.parametrize(
    ("name", "image", "sentence"),
    [
        ("lenett", None, "no model 'lenett'"),
        ("lenet", "28", "channels x height x width"),
        ("nowhere.py:Net", None, r"no file nowhere\.py"),
        ("FILE:large", None, "no function or class 'large'"),
        ("FILE:odd", None, "without arguments.*size"),
        ("FILE:not_one", None, "dict"),
        ("FILE:small", "4x8x8", "cannot take an image of 4x8x8"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(name: str, image: str | None, sentence: str, model_file: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        shown(name.replace("FILE", model_file), image)
    assert "\n" not in str(caught.value)
