"""The coordinator is told to stop: the round in progress is ended and a checkpoint made, and what goes on from it is as it would
have been."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation import Case, Outcome, Pace, simulate
from test_rounds_simulated import PLAIN, SPARE, cases, check_exact, check_kept, check_ledger, check_same_everywhere, few

from roundtable.common.config.settings import PolicyName, Settings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def rolled_back(outcome: Outcome) -> list[tuple[int, int]]:
    """To which round the run was put back each time, and how many rounds were lost by that."""
    return [(e.data["to"], e.data["rounds"]) for e in outcome.log.events if e.kind == "rolled back"]


@pytest.mark.parametrize("policy", ["sync", "backup", "ssp", "async", "local"])
@pytest.mark.parametrize("at", [0.8, pytest.param(3.0, marks=pytest.mark.long)])
def test_no_round_that_was_done_is_lost_not_even_the_first(tmp_path: Path, policy: PolicyName, at: float) -> None:
    settings = Settings(workers=2, servers=3, policy=policy, global_batch=8, micro_batch=2, local_steps=2)
    case = Case(settings, [Pace(0.3)] * 2, ((48, 3),), **PLAIN, folder=tmp_path, stopped=[(at, 5.0)])  # type: ignore[arg-type]
    outcome = simulate(case)
    ((to, lost),) = rolled_back(outcome)
    assert outcome.world.stopped == 1 and outcome.world.restarts == 0
    assert to > 0 and lost <= 2
    check_ledger(outcome)
    check_same_everywhere(outcome)


def test_before_anything_is_trained_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    settings = Settings(workers=2, servers=1, global_batch=8, micro_batch=2)
    case = Case(settings, [Pace(0.3), Pace(0.3, starts_s=6.0)], ((48, 2),), folder=tmp_path, stopped=[(2.0, 1.0)])
    outcome = simulate(case)
    assert outcome.world.stopped == 1 and [event.kind for event in outcome.log.events].count("stopping") == 1
    check_exact(outcome)


def test_a_server_that_is_away_makes_it_stop_without_a_checkpoint(tmp_path: Path) -> None:
    settings = Settings(workers=2, servers=2, global_batch=8, micro_batch=2)
    killed = [("server-1", 1.0, 40.0)]
    case = Case(settings, [Pace(0.3)] * 2, ((48, 3),), folder=tmp_path, killed=killed, stopped=[(1.1, 1.0)])
    outcome = simulate(case)
    assert outcome.world.stopped == 1
    check_exact(outcome)


@pytest.mark.parametrize("policy", ["sync", "backup", "ssp", "async"])
def test_a_worker_that_is_told_to_stop_hands_over_what_it_has(tmp_path: Path, policy: PolicyName) -> None:
    settings = Settings(workers=3, servers=2, policy=policy, global_batch=8, micro_batch=2)
    told = [("worker-1", 2.0, float("inf"))]
    outcome = simulate(Case(settings, [Pace(0.3)] * 3, ((48, 3),), **PLAIN, folder=tmp_path, told=told))  # type: ignore[arg-type]
    assert outcome.world.left == 1 and not rolled_back(outcome)
    kinds = {event.kind for event in outcome.log.events if event.process == "worker-1"}
    assert "left" in kinds and "lost" not in kinds
    check_ledger(outcome)
    check_same_everywhere(outcome)
    check_kept(outcome)


@pytest.mark.parametrize("replicas", [0, 1])
def test_a_server_that_is_told_to_stop_leaves_after_a_checkpoint(tmp_path: Path, replicas: int) -> None:
    settings = Settings(workers=2, servers=2, global_batch=8, micro_batch=2, replicas=replicas)
    told = [("server-1", 3.0, 1.0)]
    outcome = simulate(Case(settings, [Pace(0.3)] * 2, ((48, 3),), folder=tmp_path, told=told))
    assert outcome.world.left == 1 and outcome.world.restarts == 1 - replicas
    back = rolled_back(outcome)
    assert not back if replicas else back[0][0] > 0 and back[0][1] <= 2
    check_ledger(outcome)
    check_exact(outcome)


def test_a_worker_of_replicas_that_are_trained_apart_leaves_after_a_merge(tmp_path: Path) -> None:
    settings = Settings(workers=2, servers=2, policy="local", global_batch=8, micro_batch=2, local_steps=2)
    told = [("worker-1", 3.0, 1.0)]
    case = Case(settings, [Pace(0.3)] * 2, ((48, 3),), **PLAIN, folder=tmp_path, told=told)  # type: ignore[arg-type]
    outcome = simulate(case)
    assert outcome.world.left == 1 and outcome.world.restarts == 1 and rolled_back(outcome)[0][0] > 0
    check_ledger(outcome)


@pytest.mark.parametrize("with_coordinator", [True, False])
def test_all_are_told_at_once(tmp_path: Path, with_coordinator: bool) -> None:
    settings = Settings(workers=3, servers=2, global_batch=8, micro_batch=2)
    told = [(name, 3.0, 1.0) for name in ("worker-0", "worker-1", "worker-2", "server-0", "server-1")]
    stopped = [(3.5, 1.0)] if with_coordinator else []
    outcome = simulate(Case(settings, [Pace(0.3)] * 3, ((48, 3),), folder=tmp_path, told=told, stopped=stopped))
    assert outcome.world.stopped == with_coordinator
    assert all(to > 0 and lost <= 2 for to, lost in rolled_back(outcome))
    check_ledger(outcome)
    check_exact(outcome)


@st.composite
def stops(draw: st.DrawFn, policy: str, **more: object) -> Case:
    """A run that is told to stop, more than once maybe, or twice at once."""
    case = draw(cases(policy, **more))  # type: ignore[arg-type]
    away = st.sampled_from([0.05, 1.0, 20.0])
    stopped = draw(st.lists(st.tuples(st.floats(0.0, 12.0), away), min_size=1, max_size=3))
    if draw(st.booleans()):
        stopped.append((stopped[0][0] + 0.3, draw(away)))
    return replace(case, stopped=stopped)


@st.composite
def leavings(draw: st.DrawFn, policy: str, **more: object) -> Case:
    """A run of which servers and workers are told to stop, some of them twice or all at once; maybe the coordinator too."""
    case = draw(cases(policy, **more))  # type: ignore[arg-type]
    names = [f"server-{n}" for n in range(case.settings.servers)] + [f"worker-{n}" for n in range(len(case.paces))]
    away, at = st.sampled_from([0.05, 1.0, 20.0]), st.floats(0.0, 12.0)
    told = draw(st.lists(st.tuples(st.sampled_from(names), at, away), min_size=1, max_size=4))
    if draw(st.booleans()):
        then = draw(at)
        told += [(name, then, 1.0) for name in names]
    stopped = draw(st.lists(st.tuples(at, away), max_size=1))
    return replace(case, told=told, stopped=stopped)


@pytest.mark.parametrize("policy", ["sync", "backup", "ssp", "async"])
@few
@given(data=st.data())
def test_whatever_it_was_at_the_run_goes_on(tmp_path_factory: pytest.TempPathFactory, policy: str, data: st.DataObject) -> None:
    more = data.draw(st.sampled_from([{}, SPARE]))
    case = data.draw(stops(policy, **more, **({} if policy == "sync" else PLAIN)))
    outcome = simulate(replace(case, folder=tmp_path_factory.mktemp("run")))
    check_ledger(outcome)
    check_same_everywhere(outcome)
    check_kept(outcome)


@pytest.mark.parametrize("policy", ["sync", "backup", "ssp", "async"])
@few
@given(data=st.data())
def test_whoever_is_told_to_stop(tmp_path_factory: pytest.TempPathFactory, policy: str, data: st.DataObject) -> None:
    more = data.draw(st.sampled_from([{}, SPARE]))
    case = data.draw(leavings(policy, **more, **({} if policy == "sync" else PLAIN)))
    outcome = simulate(replace(case, folder=tmp_path_factory.mktemp("run")))
    check_ledger(outcome)
    check_same_everywhere(outcome)
    check_kept(outcome)
