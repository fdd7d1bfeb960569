"""Shares: complete, contiguous, near to the weights; and which table holds for a round."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from roundtable.common.config.work_shares import ShareTable, in_force, shares

weights = st.lists(st.integers(0, 100), min_size=1, max_size=12).filter(any)


@given(st.integers(0, 100), weights)
def test_shares_are_contiguous_and_complete(count: int, ws: list[int]) -> None:
    runs = shares(count, ws)
    assert len(runs) == len(ws)
    assert [k for run in runs for k in run] == list(range(count))
    assert runs[0].start == 0 and runs[-1].stop == count
    assert all(a.stop == b.start for a, b in pairwise(runs))


@given(st.integers(0, 100), weights)
def test_a_share_is_within_one_of_its_weight(count: int, ws: list[int]) -> None:
    for run, weight in zip(shares(count, ws), ws, strict=True):
        assert abs(len(run) - count * weight / sum(ws)) <= 1
        assert weight or not run


@given(st.integers(1, 30), st.integers(1, 30))
def test_equal_weights_give_shares_that_differ_by_one_at_most(count: int, workers: int) -> None:
    sizes = [len(run) for run in shares(count, [1] * workers)]
    assert max(sizes) - min(sizes) <= 1
    assert sum(size > 0 for size in sizes) == min(count, workers)


@given(st.integers(0, 100), weights, st.integers(1, 9))
def test_only_the_proportions_count(count: int, ws: list[int], factor: int) -> None:
    assert shares(count, ws) == shares(count, [w * factor for w in ws])


@pytest.mark.parametrize("ws", [[], [0], [0, 0], [2, -1]])
def test_weights_that_say_nothing_are_refused(ws: list[int]) -> None:
    with pytest.raises(ValueError):
        shares(4, ws)


@given(st.integers(1, 40), weights)
def test_every_micro_batch_has_the_owner_in_whose_run_it_is(count: int, ws: list[int]) -> None:
    names = [f"worker-{n}" for n in range(len(ws))]
    table = ShareTable(1, 0, names, ws)
    assert [table.owner(k, count) for k in range(count)] == [name for name in names for _ in table.run(name, count)]
    assert not table.run("worker-99", count)


@given(st.lists(st.integers(0, 50), min_size=1, unique=True).map(sorted), st.integers(0, 60))
def test_the_newest_table_that_has_begun_is_in_force(froms: list[int], round_: int) -> None:
    tables = [ShareTable(epoch, first, ["worker-0"], [1]) for epoch, first in enumerate(froms)]
    begun = [table for table in tables if table.from_round <= round_]
    assume(begun)
    assert in_force(tables, round_) == begun[-1]


def test_a_round_whose_table_was_forgotten_goes_by_the_oldest_known() -> None:
    tables = [ShareTable(9, 40, ["worker-1"], [1]), ShareTable(10, 50, ["worker-2"], [1])]
    assert in_force(tables, 3) == tables[0]
    assert in_force(tables, -1) == tables[0]
