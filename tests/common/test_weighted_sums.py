"""The contribution of a micro-batch by its weight, and the mean over a round."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roundtable.common.model.layout import make_layout
from roundtable.common.model.metrics import add_metrics, mean_metrics
from roundtable.common.model.partial_sum import Sum, adder, is_put_off, weighted
from roundtable.common.protocol.model_spec import TensorSpec

(CHUNK,) = make_layout([TensorSpec("w", [5], "float32", 0)], 1).chunks


def contribution(values: torch.Tensor, weight: float) -> Sum:
    return weighted(values.clone(), 1, weight, "param")


@pytest.mark.parametrize(("weight", "put_off"), [(1, True), (64, True), (2.0**40, True), (0.5, False), (3, False), (0.3, False)])
def test_only_powers_of_two_from_1_on_are_multiplied_later(weight: float, put_off: bool) -> None:
    values = torch.linspace(-1, 1, 5)
    found = contribution(values, weight)
    assert is_put_off(weight) is put_off and found.scale == (weight if put_off else 1.0)
    assert torch.equal(found.values * found.scale, values * weight)


@pytest.mark.parametrize("kind", ["param", "mean", "max", "sum", "last"])
def test_without_weight_nothing_is_added_to_a_mean_even_of_what_is_no_number(kind: str) -> None:
    values = torch.full((5,), float("nan"))
    found = weighted(values, 1, 0.0, kind)  # type: ignore[arg-type]
    if kind == "param":
        assert found.is_nothing
    elif kind == "mean":
        assert not found.present and not found.values.any()
    else:
        assert found.present == 1 and found.values is values


@given(st.lists(st.sampled_from([0.0, 1.0, 64.0, 0.25, 0.3, 7.0]), min_size=1, max_size=6))
def test_a_sum_of_contributions_is_the_sum_of_gradient_times_weight(weights: list[float]) -> None:
    generator = torch.Generator().manual_seed(len(weights))
    gradients = [torch.randn(5, generator=generator) for _ in weights]
    total = functools.reduce(adder(CHUNK), [contribution(g, w) for g, w in zip(gradients, weights, strict=True)])
    expected = sum((g.double() * w for g, w in zip(gradients, weights, strict=True)), torch.zeros(5).double())
    if not any(weights):
        assert total.is_nothing
    else:
        torch.testing.assert_close((total.values * total.scale).double(), expected, rtol=1e-5, atol=1e-5)


def test_metrics_are_means_by_weight_of_what_has_one() -> None:
    total = add_metrics({"loss": (2.0 * 3, 3.0)}, {"loss": (8.0, 1.0), "rare": (0.0, 0.0)})
    assert mean_metrics(total) == {"loss": 3.5}
