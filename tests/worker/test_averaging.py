"""The arithmetic of merging: weighted means, and the greedy soup."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roundtable.worker.merge.averaging import greedy, mean

numbers = st.floats(-10, 10, allow_nan=False)


def test_the_mean_is_weighted_and_keeps_dtypes() -> None:
    models = [{"w": torch.tensor([1.0, 2.0]), "h": torch.tensor([2.0], dtype=torch.bfloat16)}, {"w": torch.tensor([5.0, 0.0])}]
    models[1]["h"] = torch.tensor([4.0], dtype=torch.bfloat16)
    merged = mean(models, [3, 1])
    assert merged["w"].tolist() == [2.0, 1.5]
    assert (merged["h"].item(), merged["h"].dtype) == (2.5, torch.bfloat16)


def test_counters_are_not_averaged_but_the_largest_is_taken() -> None:
    models = [{"n": torch.tensor(3), "b": torch.tensor([True, False])}, {"n": torch.tensor(8), "b": torch.tensor([False, False])}]
    merged = mean(models, [1, 1])
    assert merged["n"].item() == 8 and merged["n"].dtype == torch.int64
    assert merged["b"].tolist() == [True, False]


def test_buffers_are_merged_by_their_rules_whatever_their_dtype() -> None:
    models = [
        {"q": torch.tensor([1.0]), "n": torch.tensor([i, 1], dtype=torch.uint16), "m": torch.tensor([float(i)])} for i in (3, 2)
    ]
    models[1]["q"] = torch.tensor([9.0])
    models = [model | {"e": model["m"].to(torch.float8_e5m2)} for model in models]
    merged = mean(models, [1, 3], {"q": "last", "n": "sum", "m": "max"})
    assert [merged[name].tolist() for name in "qnme"] == [[9.0], [5, 2], [3.0], [2.0]]
    assert (merged["n"].dtype, merged["e"].dtype) == (torch.uint16, torch.float8_e5m2)
    assert mean(models, [1, 0], {"q": "last"})["q"].item() == 1.0
    assert mean(models, [1, 1])["n"].tolist() == [3, 1]


def test_what_has_no_weight_is_left_out_even_if_it_is_no_number() -> None:
    ruined = {"w": torch.tensor([math.nan, math.inf]), "n": torch.tensor(99)}
    good = {"w": torch.tensor([1.0, -1.0]), "n": torch.tensor(1)}
    merged = mean([ruined, good], [0, 2])
    assert merged["w"].tolist() == [1.0, -1.0] and merged["n"].item() == 1


@given(st.integers(1, 6), st.integers(1, 1 << 20))
def test_the_mean_of_equal_models_is_that_model(count: int, seed: int) -> None:
    model = {"w": torch.randn(17, generator=torch.Generator().manual_seed(seed))}
    merged = mean([model] * count, list(range(1, count + 1)))
    assert torch.equal(merged["w"], model["w"])


def soup(points: Sequence[float], target: float) -> tuple[list[int], float, list[float]]:
    """Models are points on a line, and a mean is the better the nearer it is to `target`."""

    def score(chosen: Sequence[int]) -> float:
        return -abs(sum(points[i] for i in chosen) / len(chosen) - target)

    own = [score([i]) for i in range(len(points))]
    chosen = greedy(own, score)
    return chosen, score(chosen), own


@given(st.lists(numbers, min_size=1, max_size=7), numbers)
def test_a_greedy_soup_is_no_worse_than_its_best_part(points: list[float], target: float) -> None:
    chosen, score, own = soup(points, target)
    assert score >= max(own)
    assert len(set(chosen)) == len(chosen) and own[chosen[0]] == max(own)


def test_parts_are_tried_best_first_and_stay_if_the_score_does_not_fall() -> None:
    tried: list[list[int]] = []

    def evaluate(chosen: Sequence[int]) -> float:
        tried.append(list(chosen))
        return {(2, 0): 0.9, (2, 0, 3): 0.8, (2, 0, 1): 0.95}[tuple(chosen)]

    assert greedy([0.8, 0.5, 0.9, 0.7], evaluate) == [2, 0, 1]
    assert tried == [[2, 0], [2, 0, 3], [2, 0, 1]]


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_score_that_is_no_number_counts_as_less_than_any(bad: float) -> None:
    assert greedy([bad, 0.1], lambda chosen: bad) == [1]
    assert greedy([0.1, 0.2, 0.3], lambda chosen: bad) == [2]
