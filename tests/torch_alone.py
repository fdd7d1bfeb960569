"""Parts of plain loops with torch alone, without this library: tests compare runs with them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")


def tree_sum(terms: Sequence[T], add: Callable[[T, T], T] = torch.add) -> T:
    """Add pairs of neighbours, level by level. An odd one out goes up as it is."""
    left = list(terms)
    while len(left) > 1:
        paired = [add(a, b) for a, b in zip(left[::2], left[1::2], strict=False)]
        left = paired + ([left[-1]] if len(left) % 2 else [])
    return left[0]


def take_gradients(parameters: Sequence[nn.Parameter], micro_batches: Iterable[tuple[torch.Tensor, int]]) -> None:
    """Give parameters the mean gradient of a round, whose micro-batches are given as (loss, samples)."""
    terms, samples = [], 0
    for loss, number in micro_batches:
        terms.append([gradient * number for gradient in torch.autograd.grad(loss, parameters)])
        samples += number
    for parameter, total in zip(parameters, map(tree_sum, zip(*terms, strict=True)), strict=True):
        parameter.grad = total / samples


def sha256(model: nn.Module) -> str:
    """Return the hash that a run's summary has of a model's weights."""
    digest = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()
