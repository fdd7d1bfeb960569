"""Merging models that were trained apart: the arithmetic, of models as tensors by name.

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
    """The weighted mean of models that have the same names and shapes, tensor by tensor, in the first one's dtypes.

    It is summed in double precision. A tensor that has no fractions, such as a counter of batches, is not averaged: it is the
    largest of them all. `rules` says otherwise of buffers: `max`, `sum`, or `last`, the value in the last model. A weight of 0
    leaves a model out, even one whose weights are no numbers. The weights need not sum to 1.
    """
    counted = [(model, weight) for model, weight in zip(models, weights, strict=True) if weight]
    total = math.fsum(weight for _, weight in counted)
    shares = [weight / total for _, weight in counted]
    return {
        name: _merged([model[name] for model, _ in counted], shares, (rules or {}).get(name, "mean")) for name in counted[0][0]
    }


def _merged(values: Sequence[torch.Tensor], shares: Sequence[float], rule: Rule) -> torch.Tensor:
    """One tensor of several models."""
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
