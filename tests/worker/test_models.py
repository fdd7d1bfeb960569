"""The built-in networks fit the images they are for, and learn."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from roundtable.common.config.settings import choices, make_settings
from roundtable.common.runtime.errors import UsageError
from roundtable.worker.models.builtin import MODELS, Shape, build
from roundtable.worker.tools.builtin_script import optimizer_class, schedule

FITTING = [
    *((name, (1, side, side)) for name in ("lenet", "mlp", "cnn") for side in (8, 28)),
    *((name, (3, side, side)) for name in ("lenet", "mlp", "cnn") for side in (32, 64)),
    *((name, (2, 9, 13)) for name in ("lenet", "mlp", "cnn")),
    *(("lenet", (1, side, side)) for side in (4, 5, 11, 12, 13)),
    ("mlp", (1, 1, 1)),
    ("cnn", (1, 4, 7)),
    *(("alexnet", shape) for shape in ((3, 64, 64), (1, 96, 70))),
    ("alexnet-2012", (1, 63, 70)),
    ("alexnet-text", (1, 33, 40)),
]


@pytest.mark.parametrize(("name", "shape"), FITTING)
def test_a_model_turns_images_into_one_logit_a_class(name: str, shape: Shape) -> None:
    logits = build(name, shape, classes=7)(torch.zeros(2, *shape))
    assert logits.shape == (2, 7) and bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_parameter_of_a_model_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, (3, 64, 64), classes=5)
    loss = cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_alexnet_has_the_weights_that_it_has_elsewhere() -> None:
    with torch.device("meta"):
        model = build("alexnet", (3, 224, 224), classes=1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == 61_100_840
    assert {"features.0.weight", "features.10.bias", "classifier.1.weight", "classifier.6.bias"} <= model.state_dict().keys()


def test_the_cnn_has_buffers_and_random_numbers_to_test_with() -> None:
    model = build("cnn", (3, 32, 32), classes=10)
    assert dict(model.named_buffers())
    image = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(image), model(image))


def test_the_same_seed_gives_the_same_weights() -> None:
    def weights() -> torch.Tensor:
        torch.manual_seed(3)
        return torch.cat([parameter.flatten() for parameter in build("lenet", (1, 28, 28), 10).parameters()])

    assert torch.equal(weights(), weights())


def test_an_unknown_model_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(UsageError, match=r"lenett.*alexnet, alexnet-2012, alexnet-text, cnn, lenet, mlp"):
        build("lenett", (1, 28, 28), 10)


@pytest.mark.parametrize(
    ("name", "side"), [("alexnet", 63), ("alexnet-2012", 62), ("alexnet-text", 32), ("lenet", 3), ("cnn", 3)]
)
def test_images_that_are_too_small_for_a_model_are_refused(name: str, side: int) -> None:
    with pytest.raises(UsageError, match=rf"{name}.*{side}x{side}"):
        build(name, (1, side, side), 10)


def test_every_name_that_a_setting_may_have_is_there() -> None:
    assert set(choices("model")) == set(MODELS)
    optimizers = {name for name in choices("optimizer") if hasattr(torch.optim, name)}  # Muon is not in every version
    assert all(optimizer_class(name).__name__ == name for name in optimizers) and {"SGD", "AdamW"} <= optimizers
    for name in choices("schedule"):
        schedule(make_settings({"schedule": name}, "").example, 4)
