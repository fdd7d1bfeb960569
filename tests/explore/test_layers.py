"""Layers are found by either name, give what they give and nothing later, and see the part of the image that gradients say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from roundtable.common.runtime.errors import UsageError
from roundtable.explore.layers import features_of, last_hidden, receptive_field
from roundtable.worker.models.builtin import build
from roundtable.worker.models.layer_names import find_layer, short_name, short_names


def test_layers_have_short_names_by_kind_in_their_order() -> None:
    names = short_names(build("lenet", (1, 28, 28), 10))
    assert list(names)[:6] == ["conv1", "relu1", "pool1", "conv2", "relu2", "pool2"]
    assert {key: names[key] for key in ("conv2", "fc1", "fc3")} == {"conv2": "3", "fc1": "7", "fc3": "11"}
    alexnet = build("alexnet", (3, 64, 64), 10)
    assert find_layer(alexnet, "conv5") == find_layer(alexnet, "features.10") == "features.10"
    assert short_name(alexnet, "features.10") == "conv5" and short_name(alexnet, "features") == "features"


def test_a_name_of_the_model_itself_is_meant_before_a_short_one() -> None:
    model = nn.Sequential()
    model.add_module("conv2", nn.Conv2d(1, 1, 1))
    model.add_module("conv1", nn.Conv2d(1, 1, 1))
    assert find_layer(model, "conv1") == "conv1"


def test_an_unknown_layer_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(UsageError, match=r"no layer 'conv3'.* conv1 \(0\), .*conv2 \(3\), .*fc3 \(11\)\."):
        find_layer(build("lenet", (1, 28, 28), 10), "conv3")
    with pytest.raises(UsageError, match=r"conv1 \(features.0\).* avgpool|pool4 \(avgpool\).* features"):
        find_layer(build("alexnet", (3, 64, 64), 10), "")


@pytest.mark.parametrize(("name", "layer"), [("mlp", "relu2"), ("lenet", "relu4"), ("cnn", "relu5"), ("alexnet", "relu7")])
def test_the_last_hidden_layer_is_what_the_classifier_sees(name: str, layer: str) -> None:
    model = build(name, (3, 64, 64), 10)
    assert short_name(model, last_hidden(model)) == layer


def test_a_model_without_hidden_layers_has_to_be_told_which() -> None:
    with pytest.raises(UsageError, match="--layer"):
        last_hidden(nn.Sequential(nn.Linear(4, 2)))


def test_features_are_flattened_and_not_changed_by_what_follows_in_place() -> None:
    model, images = build("alexnet", (3, 64, 64), 10).eval(), torch.randn(2, 3, 64, 64)
    assert isinstance(model.features, nn.Sequential)
    found = features_of(model, "features.0", images)
    assert found.dtype == torch.float32 and torch.equal(found, model.features[0](images).detach().flatten(1))
    assert (found < 0).any()


def test_a_layer_that_gives_no_row_for_each_image_has_no_features() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x, x

    with pytest.raises(UsageError, match="layer 'odd1'"):
        features_of(nn.Sequential(nn.Identity(), Odd()), "1", torch.zeros(2, 3))


def test_receptive_fields_of_alexnet_are_those_of_the_literature() -> None:
    model, image = build("alexnet", (3, 64, 64), 10).eval(), torch.zeros(1, 3, 64, 64)
    fields = [receptive_field(model, find_layer(model, f"conv{n}"), image) for n in (1, 2, 3, 4, 5)]
    assert [field.size for field in fields] == [(side, side) for side in (11, 51, 99, 131, 163)]
    assert [field.stride for field in fields] == [(step, step) for step in (4, 8, 16, 16, 16)]
    assert fields[0].start == (-2, -2) and fields[0].box(2, 0) == (slice(6, 17), slice(-2, 9))


PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def chains(draw: st.DrawFn) -> nn.Sequential:
    """Layers of positive weights, so that no gradient is cancelled."""
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 4))):
        kernel, stride = draw(PAIR), draw(PAIR)
        pad = (draw(st.integers(0, kernel[0] // 2)), draw(st.integers(0, kernel[1] // 2)))
        if draw(st.booleans()):
            same = draw(st.booleans()) and kernel[0] % 2 == kernel[1] % 2 == 1
            layer = nn.Conv2d(1, 1, kernel, 1 if same else stride, "same" if same else pad, draw(PAIR), bias=False)
            nn.init.ones_(layer.weight)
            layers += [layer, nn.ReLU(inplace=True)]
        else:
            layers.append(nn.AvgPool2d(kernel, stride, pad))
    return nn.Sequential(*layers)


@given(chains())
@settings(max_examples=30)
def test_a_unit_sees_exactly_the_pixels_that_its_gradient_reaches(model: nn.Sequential) -> None:
    image = torch.ones(1, 1, 90, 90)
    field = receptive_field(model, str(len(model) - 1), image)
    image.requires_grad_()
    maps = model(image)
    row, column = maps.shape[2] // 2, maps.shape[3] // 2
    rows, columns = field.box(row, column)
    assume(min(rows.start, columns.start) >= 0 and max(rows.stop, columns.stop) <= 90)
    maps[0, 0, row, column].backward()
    assert image.grad is not None
    touched = image.grad[0, 0].nonzero()
    low, high = touched.amin(0).tolist(), touched.amax(0).tolist()
    assert (low, high) == ([rows.start, columns.start], [rows.stop - 1, columns.stop - 1])


def test_what_a_unit_sees_is_unknown_where_layers_are_no_chain_of_maps() -> None:
    class Branched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x) * 2)

    with pytest.raises(UsageError, match="'conv2' does not get what 'conv1' gives"):
        receptive_field(Branched(), "b", torch.zeros(1, 1, 8, 8))
    with pytest.raises(UsageError, match="Flatten"):
        receptive_field(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), "1", torch.zeros(1, 1, 8, 8))
