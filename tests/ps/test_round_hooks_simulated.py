"""Scripts have a function called at the end of each round (`run.on_round`): in order, once, and with just the round's weights."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation import Case, Outcome, Pace, WorkerProcess, same, sequential, simulate
from test_rounds_simulated import PLAIN, cases, check_ledger, check_same_everywhere, few, some

from roundtable.common.config.settings import PolicyName, Settings

pytestmark = [pytest.mark.usefixtures("one_thread")]


def calls(outcome: Outcome) -> dict[str, list[int]]:
    """The values of `run.round` that each worker's function saw, once these and the weights are checked."""
    expected = sequential(outcome.case) if outcome.case.settings.policy == "sync" else None
    found = {}
    for key, process in outcome.world.processes.items():
        if not isinstance(process, WorkerProcess) or process.pace.on_round_s < 0:
            continue
        found[key] = rounds = [round_ for round_, _ in process.ended]
        assert rounds == sorted(set(rounds))
        assert not rounds or rounds[0] > process.began
        if expected is not None:
            assert all(same(expected[round_], weights) for round_, weights in process.ended)
        if key in outcome.models:
            assert not rounds or rounds[-1] == outcome.ledger.end
    return found


def same_on_all(outcome: Outcome) -> None:
    """All workers' functions saw the same weights in a round."""
    first: dict[int, Any] = {}
    for process in outcome.world.processes.values():
        for round_, weights in process.ended if isinstance(process, WorkerProcess) else ():
            assert same(first.setdefault(round_, weights), weights)


@pytest.mark.parametrize("policy", ["sync", "backup", "ssp", "async", "local", "average"])
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_that_keep_up_are_called_for_every_round(policy: PolicyName, workers: int) -> None:
    settings = Settings(
        workers=workers, servers=2, policy=policy, global_batch=12, micro_batch=2, local_steps=2, outer_momentum=0.0
    )
    outcome = simulate(Case(settings, [Pace(0.1, on_round_s=0.05)] * workers, ((48, 1), (36, 2)), **PLAIN))
    check_same_everywhere(outcome)
    assert calls(outcome) == {f"worker-{n}": list(range(1, 11)) for n in range(workers)}
    if policy in ("sync", "backup"):
        same_on_all(outcome)


@pytest.mark.parametrize("memory", ["", "shared"])
def test_a_worker_far_behind_misses_rounds_but_never_sees_newer_weights(memory: Any, caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(workers=3, servers=2, global_batch=12, micro_batch=2)
    paces = [Pace(0.1, on_round_s=0), Pace(0.1, on_round_s=0), Pace(0.1, on_round_s=12.0)]
    with caplog.at_level(logging.WARNING):
        outcome = simulate(Case(settings, paces, ((240, 2),), memory=memory, weight_buffers=2))
    found = calls(outcome)
    assert found["worker-0"] == found["worker-1"] == list(range(1, 41))
    assert len(found["worker-2"]) < 40
    (said,) = [record.getMessage() for record in caplog.records if "on_round" in record.getMessage()]
    first = next(now for before, now in zip([0, *found["worker-2"]], found["worker-2"], strict=False) if now > before + 1)
    assert f"before the call with run.round {first}, the functions of run.on_round() have missed" in said


def test_one_that_joins_late_is_called_from_the_next_round_on() -> None:
    settings = Settings(workers=2, servers=2, global_batch=12, micro_batch=2)
    paces = [Pace(0.3, on_round_s=0), Pace(0.3, on_round_s=0), Pace(0.3, starts_s=3.0, on_round_s=0)]
    outcome = simulate(Case(settings, paces, ((48, 4),)))
    process = outcome.world.processes["worker-2"]
    assert isinstance(process, WorkerProcess) and 0 < process.began < 16
    assert calls(outcome)["worker-2"] == list(range(process.began + 1, 17))


@pytest.mark.parametrize("policy", ["sync", "backup", "local", "average"])
def test_all_that_stop_there_after_the_same_round_end_with_just_that_one(policy: PolicyName) -> None:
    settings = Settings(workers=3, servers=2, policy=policy, global_batch=12, micro_batch=2, local_steps=2, outer_momentum=0.0)
    paces = [Pace(0.1 * (n + 1), on_round_s=0, hook_ends_round=4) for n in range(3)]
    outcome = simulate(Case(settings, paces, ((48, 1), (48, 2)), **PLAIN))
    check_same_everywhere(outcome)
    assert outcome.ledger.end == 4
    assert set(map(tuple, calls(outcome).values())) == {(1, 2, 3, 4)}


@st.composite
def hooked(draw: st.DrawFn, policy: str, **more: Any) -> Case:
    """A run whose scripts have a function for the end of rounds, which may take long, and may end the run."""
    case = draw(cases(policy, **more))
    paces = [
        replace(
            pace,
            on_round_s=draw(st.sampled_from([-1.0, 0.0, 0.1, 2.0, 8.0])),
            hook_ends_round=draw(st.sampled_from([float("inf")] * 4 + [2.0])),
        )
        for pace in case.paces
    ]
    return replace(case, paces=paces)


def check(outcome: Outcome) -> None:
    calls(outcome)
    check_same_everywhere(outcome)
    if outcome.case.settings.policy in ("sync", "backup"):
        same_on_all(outcome)
    if outcome.ledger.run_end is None:
        check_ledger(outcome)


@pytest.mark.parametrize("policy", ["sync", "backup", "ssp", "async", "local", "average"])
@some
@given(data=st.data())
def test_over_bad_networks_each_call_has_the_weights_of_its_round(policy: str, data: st.DataObject) -> None:
    check(simulate(data.draw(hooked(policy, **({} if policy == "sync" else PLAIN)))))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["sync", "backup", "ssp", "local"])
@few
@given(data=st.data())
def test_whoever_dies_each_call_has_the_weights_of_its_round(
    tmp_path_factory: pytest.TempPathFactory, policy: str, data: st.DataObject
) -> None:
    case = data.draw(hooked(policy, **({} if policy == "sync" else PLAIN)))
    names = [
        "coordinator",
        *(f"server-{n}" for n in range(case.settings.servers)),
        *(f"worker-{n}" for n in range(len(case.paces))),
    ]
    killed = st.tuples(st.sampled_from(names), st.floats(0.0, 6.0), st.sampled_from([0.05, 1.0, 5.0]))
    case = replace(case, killed=data.draw(st.lists(killed, min_size=1, max_size=3)), near=True)
    folder: Path = tmp_path_factory.mktemp("run")
    check(simulate(replace(case, folder=folder)))
