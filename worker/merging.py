"""Merging models that were trained apart: the arithmetic, of models as tensors by name.

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference
time" (ICML 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

K = TypeVar("K")


def mean(models: Sequence[Mapping[K, torch.Tensor]], weights: Sequence[float]) -> dict[K, torch.Tensor]:
    """The weighted mean of models that have the same names and shapes, tensor by tensor, in the first one's dtypes.

    It is summed in double precision. A tensor that has no fractions, such as a counter of batches, is not averaged: it is the
    largest of them all. A weight of 0 leaves a model out, even one whose weights are no numbers. The weights need not sum to 1.
    """
    counted = [(model, weight) for model, weight in zip(models, weights, strict=True) if weight]
    total = math.fsum(weight for _, weight in counted)
    out = {}
    for name, first in counted[0][0].items():
        if first.is_floating_point() or first.is_complex():
            wide = torch.promote_types(first.dtype, torch.float64)
            value = torch.zeros(first.shape, dtype=wide)
            for model, weight in counted:
                value += model[name].to(wide) * (weight / total)
        else:
            value = first
            for model, _ in counted[1:]:
                value = torch.maximum(value, model[name])
        out[name] = value.to(first.dtype)
    return out


def greedy(scores: Sequence[float], evaluate: Callable[[Sequence[int]], float]) -> list[int]:
    """Numbers of the models whose mean is the greedy soup (recipe 1), in the order in which they were added.

    `scores` are the models' own, more is better; `evaluate(numbers)` gives that of the mean of some. Models are tried best first,
    of equal ones that with the lower number, and one stays in the mean if the score does not fall. A score that is no number
    counts as less than any.
    """
    order = sorted(range(len(scores)), key=lambda number: (-_number(scores[number]), number))
    chosen, best = order[:1], _number(scores[order[0]])
    for number in order[1:]:
        score = _number(evaluate([*chosen, number]))
        if score >= best:
            chosen, best = [*chosen, number], score
    return chosen


def _number(score: float) -> float:
    return -math.inf if math.isnan(score) else score
