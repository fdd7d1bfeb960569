"""Sums of metrics: by name, the sum of value x weight, and the weight."""

from __future__ import annotations

from collections.abc import Mapping

Metrics = dict[str, tuple[float, float]]


def add_metrics(left: Mapping[str, tuple[float, float]], right: Mapping[str, tuple[float, float]]) -> Metrics:
    """Return both sums as one. A name that only one side has is kept."""
    out = dict(left)
    for name, (total, weight) in right.items():
        before = out.get(name, (0.0, 0.0))
        out[name] = before[0] + total, before[1] + weight
    return out


def mean_metrics(total: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Return the mean of each metric that has a weight above 0, by name."""
    return {name: value / weight for name, (value, weight) in total.items() if weight}
