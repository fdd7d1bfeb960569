"""Weights that are on the servers only: what needs their values is an error, and what does not is not."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.replica.absent_parameter import absent

IDS = torch.tensor([1, 3])


def table() -> nn.Embedding:
    layer = nn.Embedding(50, 8, sparse=True)
    layer.weight = absent(layer.weight, "words.weight")
    return layer


@pytest.mark.parametrize(
    "use",
    [
        lambda weight: functional.embedding(IDS, weight, sparse=True),
        lambda weight: torch.randn(2, 8) @ weight.T,
        lambda weight: functional.linear(torch.randn(2, 8), functional.normalize(weight)),
        lambda weight: weight[IDS],
        lambda weight: torch.tensor(0.0) + 1e-3 * weight.square().sum(),
    ],
)
def test_what_needs_the_values_is_told_where_they_are(use: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(UsageError, match=r"the values of 'words.weight' are on the servers.*call its layer"):
        use(table().weight)


def test_a_model_is_copied_saved_and_looked_at_as_ever() -> None:
    model = nn.Sequential(table(), nn.Linear(8, 3))
    weight = model[0].weight
    assert isinstance(weight, nn.Parameter) and weight.is_meta and weight.shape == (50, 8) and weight.grad is None
    assert sum(p.numel() for p in model.parameters()) == 50 * 8 + 8 * 3 + 3
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(other[0].weight) is nn.Parameter and other[0].weight.is_meta
    assert type(model.state_dict()["0.weight"]) is torch.Tensor
    assert "meta" in repr(weight)
