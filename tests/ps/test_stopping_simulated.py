"""The coordinator is told to stop: the round in progress is ended and a snapshot made, and what goes on from it is as it would
have been."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation import Case, Outcome, Pace, simulate
from test_rounds_simulated import PLAIN, SPARE, cases, check_books, check_exact, check_kept, check_same_everywhere, few

from common.settings import PolicyName, Settings

pytestmark = pytest.mark.usefixtures("one_thread")


def rolled_back(outcome: Outcome) -> list[tuple[int, int]]:
    """To which round the run was put back each time, and how many rounds were lost by that."""
    return [(e.data["to"], e.data["rounds"]) for e in outcome.log.events if e.kind == "rolled back"]


@pytest.mark.parametrize("policy", ["sync", "backup", "ssp", "async", "local"])
@pytest.mark.parametrize("at", [0.8, 3.0])
def test_no_round_that_was_done_is_lost_not_even_the_first(tmp_path: Path, policy: PolicyName, at: float) -> None:
    settings = Settings(workers=2, servers=3, policy=policy, global_batch=8, micro_batch=2, local_steps=2)
    case = Case(settings, [Pace(0.3)] * 2, ((48, 3),), **PLAIN, folder=tmp_path, stopped=[(at, 5.0)])  # type: ignore[arg-type]
    outcome = simulate(case)
    ((to, lost),) = rolled_back(outcome)
    assert outcome.world.stopped == 1 and outcome.world.begun_anew == 0
    assert to > 0 and lost <= 2
    check_books(outcome)
    check_same_everywhere(outcome)


def test_before_anything_is_trained_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    settings = Settings(workers=2, servers=1, global_batch=8, micro_batch=2)
    case = Case(settings, [Pace(0.3), Pace(0.3, starts_s=6.0)], ((48, 2),), folder=tmp_path, stopped=[(2.0, 1.0)])
    outcome = simulate(case)
    assert outcome.world.stopped == 1 and [event.kind for event in outcome.log.events].count("stopping") == 1
    check_exact(outcome)


def test_a_server_that_is_away_makes_it_stop_without_a_snapshot(tmp_path: Path) -> None:
    settings = Settings(workers=2, servers=2, global_batch=8, micro_batch=2)
    killed = [("server-1", 1.0, 40.0)]
    case = Case(settings, [Pace(0.3)] * 2, ((48, 3),), folder=tmp_path, killed=killed, stopped=[(1.1, 1.0)])
    outcome = simulate(case)
    assert outcome.world.stopped == 1
    check_exact(outcome)


@st.composite
def stops(draw: st.DrawFn, policy: str, **more: object) -> Case:
    """A run that is told to stop, more than once maybe, or twice at once."""
    case = draw(cases(policy, **more))  # type: ignore[arg-type]
    away = st.sampled_from([0.05, 1.0, 20.0])
    stopped = draw(st.lists(st.tuples(st.floats(0.0, 12.0), away), min_size=1, max_size=3))
    if draw(st.booleans()):
        stopped.append((stopped[0][0] + 0.3, draw(away)))
    return replace(case, stopped=stopped, real=False)


@pytest.mark.parametrize("policy", ["sync", "backup", "ssp", "async"])
@few
@given(data=st.data())
def test_whatever_it_was_at_the_run_goes_on(tmp_path_factory: pytest.TempPathFactory, policy: str, data: st.DataObject) -> None:
    more = data.draw(st.sampled_from([{}, SPARE]))
    case = data.draw(stops(policy, **more, **({} if policy == "sync" else PLAIN)))
    outcome = simulate(replace(case, folder=tmp_path_factory.mktemp("run")))
    check_books(outcome)
    check_same_everywhere(outcome)
    check_kept(outcome)
