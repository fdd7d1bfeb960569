"""The parts of a convolutional network do what a calculation by hand gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, tensor
from torch.utils.data import DataLoader

from roundtable.common.config.settings import choices
from roundtable.worker.data import load
from roundtable.worker.models.builtin import build
from roundtable.worker.models.cnn_blocks import (
    LOSSES,
    convolution,
    cross_entropy,
    max_pooling,
    mean_pooling,
    mse,
    side_after,
    sigmoid,
    softmax,
)
from roundtable.worker.tools.builtin_script import accuracy

pytestmark = pytest.mark.usefixtures("one_thread")


def a_map(*rows: list[float]) -> Tensor:
    """One image of one channel."""
    return tensor([[list(rows)]]).requires_grad_()


def gradient(x: Tensor, y: Tensor, of_y: float) -> Tensor:
    y.backward(torch.full_like(y, of_y))
    assert x.grad is not None
    return x.grad[0, 0]


def test_mean_pooling_and_its_backward() -> None:
    x = a_map([1.0, 3.0], [2.0, 2.0])
    y = mean_pooling(x, 2)
    assert y.tolist() == [[[[2.0]]]]
    assert gradient(x, y, of_y=2.0).tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_max_pooling_and_its_backward_which_remembers_where_the_largest_was() -> None:
    x = a_map([1.0, 3.0], [2.0, 2.0])
    y = max_pooling(x, 2)
    assert y.tolist() == [[[[3.0]]]]
    assert gradient(x, y, of_y=3.0).tolist() == [[0.0, 3.0], [0.0, 0.0]]


def test_pools_may_overlap() -> None:
    x = a_map([1.0, 5.0, 3.0], [0.0, 0.0, 0.0], [2.0, 0.0, 7.0])
    assert max_pooling(x, 2, stride=1)[0, 0].tolist() == [[5.0, 5.0], [2.0, 7.0]]
    assert mean_pooling(x, 2, stride=1)[0, 0].tolist() == [[1.5, 2.0], [0.5, 1.75]]


def test_twelve_filters_make_twelve_maps_of_a_color_image() -> None:
    assert convolution(torch.zeros(1, 3, 32, 32), torch.zeros(12, 3, 5, 5), padding=2).shape == (1, 12, 32, 32)


def test_a_map_is_smaller_than_the_image_by_the_filter_less_one() -> None:
    ones = torch.ones(1, 1, 5, 5)
    y = convolution(ones, torch.ones(1, 1, 3, 3))
    assert y.shape == (1, 1, 3, 3) and bool((y == 9).all())
    assert [side_after(5, 3), side_after(96, 8), side_after(224, 11, 4, 2), side_after(3, 5)] == [3, 89, 55, 0]


def test_four_hundred_features_of_8x8_on_96x96_make_more_than_three_million() -> None:
    features = convolution(torch.empty(1, 1, 96, 96, device="meta"), torch.empty(400, 1, 8, 8, device="meta"))
    assert features.numel() == 89 * 89 * 400 == 3_168_400


def test_each_filter_has_its_own_weights_for_each_channel() -> None:
    """4 channels to 2 with filters of 2x2 take 32 weights, and a map is the sum over channels and its own bias."""
    filters = torch.arange(32.0).view(2, 4, 2, 2)
    image = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    y = convolution(image, filters, bias=tensor([0.5, -2.0]))
    assert filters.numel() == 32 and y.shape == (1, 2, 2, 2)
    by_hand = sum(float((image[0, c, 1:, :2] * filters[1, c]).sum()) for c in range(4)) - 2.0
    assert math.isclose(float(y[0, 1, 1, 0]), by_hand, rel_tol=1e-5)


def test_softmax_makes_probabilities_of_each_row() -> None:
    p = softmax(tensor([[1.0, 2.0, 3.0], [-5.0, 700.0, 700.0]]))
    assert torch.allclose(p.sum(1), torch.ones(2))
    assert torch.allclose(p[1], tensor([0.0, 0.5, 0.5]))
    assert torch.allclose(p[0], tensor([1.0, math.e, math.e**2]) / (1 + math.e + math.e**2))


def test_the_gradient_of_cross_entropy_is_p_minus_y() -> None:
    logits = tensor([[0.2, -1.0, 0.7]], requires_grad=True)
    loss = cross_entropy(logits, tensor([2]))
    loss.backward()
    p = softmax(logits.detach())
    assert math.isclose(float(loss.detach()), -math.log(float(p[0, 2])), rel_tol=1e-6)
    assert logits.grad is not None and torch.allclose(logits.grad, p - tensor([[0.0, 0.0, 1.0]]))


def test_ten_ones_against_class_three_have_a_mean_squared_error_of_nine_tenths() -> None:
    outputs = torch.ones(1, 10, requires_grad=True)
    loss = mse(outputs, tensor([3]))
    loss.backward()
    assert math.isclose(float(loss.detach()), 0.9, rel_tol=1e-6)
    assert outputs.grad is not None and torch.allclose(outputs.grad[0], tensor([0.2] * 3 + [0.0] + [0.2] * 6))


def test_sigmoid_and_its_gradient() -> None:
    x = tensor([0.0, 2.0], requires_grad=True)
    y = sigmoid(x)
    y.sum().backward()
    assert torch.allclose(y, tensor([0.5, 1 / (1 + math.exp(-2))]))
    assert x.grad is not None and torch.allclose(x.grad, y.detach() * (1 - y.detach()))


@pytest.mark.parametrize(("loss", "lr"), [("cross-entropy", 0.02), ("mse", 0.3)])
def test_either_loss_trains_real_digits(loss: str, lr: float) -> None:
    torch.manual_seed(0)
    images = load("digits", None, seed=0)
    model = build("mlp", images.shape, images.classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(3):
        for x, y in DataLoader(images.train, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            LOSSES[loss](model(x), y).backward()
            optimizer.step()
    assert accuracy(model, images.test) > 0.9


def test_every_choice_of_the_setting_loss_is_a_loss() -> None:
    assert list(choices("loss")) == list(LOSSES)
