"""The coordinator is killed again and again, at any moment: the run goes on, and keeps every promise of its policy."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation import Case, Network, same, schedules, simulate
from test_rounds_simulated import PLAIN, cases, check_exact, check_ledger, check_promises, check_same_everywhere

pytestmark = pytest.mark.slow

few = schedules(2)

crash = st.tuples(st.just("coordinator"), st.floats(0.0, 12.0), st.sampled_from([0.05, 0.5, 4.0]))
crashes = st.lists(crash, min_size=1, max_size=5)


@pytest.mark.parametrize("policy", ["sync", "backup", "ssp", "async"])
@few
@given(data=st.data())
# I8, I24
def test_a_coordinator_that_crashes_changes_neither_weights_nor_ledger(policy: str, data: st.DataObject) -> None:
    plain: dict[str, Any] = {} if policy == "sync" else PLAIN
    check_promises(dataclasses.replace(data.draw(cases(policy, **plain)), killed=data.draw(crashes)))


@few
@given(cases("local"), crashes)
def test_merges_do_not_depend_on_it(case: Case, crashes: list[tuple[str, float, float]]) -> None:
    outcome = simulate(dataclasses.replace(case, killed=crashes))
    check_ledger(outcome)
    check_same_everywhere(outcome)
    quiet = simulate(dataclasses.replace(case, network=Network()))
    assert same(next(iter(outcome.models.values())), next(iter(quiet.models.values())))


@pytest.mark.parametrize("policy", ["sync", "backup"])
@few
@given(data=st.data())
# I9
def test_what_all_servers_were_told_to_do_alike_stays_so(policy: str, data: st.DataObject) -> None:
    case = data.draw(cases(policy, chunk_bytes=400, clip_norm=0.5))
    outcome = simulate(dataclasses.replace(case, killed=data.draw(crashes)))
    check_ledger(outcome)
    check_same_everywhere(outcome)
    if policy == "sync":
        check_exact(outcome)
