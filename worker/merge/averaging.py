"""Merging models that were trained apart: the arithmetic, with a model as tensors by name.

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference
time" (ICML 2022).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from roundtable.common.protocol.model_spec import Rule

K = TypeVar("K")


def mean(
    models: Sequence[Mapping[K, torch.Tensor]], weights: Sequence[float], rules: Mapping[K, Rule] | None = None
) -> dict[K, torch.Tensor]:
    """Return the weighted mean of models with the same names and shapes, tensor by tensor, in the first model's dtypes.

    The sums are in double precision. A tensor without fractions, such as a counter of batches, gets the largest value instead.
    For buffers, `rules` can choose `max`, `sum`, or `last`, the value in the last model. A weight of 0 leaves a model out, even
    one with weights that are not finite. The weights need not sum to 1.
    """
    counted = [(model, weight) for model, weight in zip(models, weights, strict=True) if weight]
    total = math.fsum(weight for _, weight in counted)
    shares = [weight / total for _, weight in counted]
    return {
        name: _merged([model[name] for model, _ in counted], shares, (rules or {}).get(name, "mean")) for name in counted[0][0]
    }


def _merged(values: Sequence[torch.Tensor], shares: Sequence[float], rule: Rule) -> torch.Tensor:
    """Return one tensor, merged from several models."""
    first = values[0]
    if rule == "last":
        return values[-1]
    has_fractions = first.is_floating_point() or first.is_complex()
    wide = torch.complex128 if first.is_complex() else torch.float64 if has_fractions else torch.int64
    if rule == "mean" and has_fractions:
        out = torch.zeros(first.shape, dtype=wide)
        for value, share in zip(values, shares, strict=True):
            out += value.to(wide) * share
        return out.to(first.dtype)
    combine = torch.add if rule == "sum" else torch.maximum
    return functools.reduce(combine, [value.to(wide) for value in values]).to(first.dtype)


def greedy(scores: Sequence[float], evaluate: Callable[[Sequence[int]], float]) -> list[int]:
    """Return the numbers of the models whose mean is the greedy soup (recipe 1), in the order in which they were added.

    `scores` are the models' own scores, more is better. `evaluate(numbers)` returns the score of a mean of models. Models are
    tried best first. Of equal models, the one with the lower number is first. A model stays in the mean if the score does not
    fall. NaN counts as the lowest score.
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
