"""Anybody is killed at any moment, several at once too, and no shard has a copy, or the run is told to stop: all restart from
the newest checkpoint, or from nothing, and every promise of the policy is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from simulation import Case, Model, Network, Outcome, Pace, same, simulate
from test_rounds_simulated import (
    PLAIN,
    SPARE,
    cases,
    check_dropped_or_counted,
    check_exact,
    check_head,
    check_kept,
    check_ledger,
    check_local_counts,
    check_same_everywhere,
    every_other_is_chosen,
    few,
    some,
)

from roundtable.common.config.batch_plan import Task
from roundtable.common.config.settings import Settings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@st.composite
def deaths(draw: st.DrawFn, policy: str, **more: Any) -> tuple[Case, bool]:
    """A run in which some are killed, and whether it makes checkpoints."""
    case = draw(cases(policy, **more))
    names = [
        "coordinator",
        *(f"server-{n}" for n in range(case.settings.servers)),
        *(f"worker-{n}" for n in range(len(case.paces))),
    ]
    away = st.sampled_from([0.05, 1.0, 6.0, 20.0])
    killed = draw(st.lists(st.tuples(st.sampled_from(names), st.floats(0.0, 12.0), away), max_size=3))
    at = draw(st.floats(0.2, 8.0))
    together = draw(st.lists(st.sampled_from(names), min_size=1, max_size=len(names), unique=True))
    killed += [(name, at, draw(away)) for name in together]
    stopped = draw(st.lists(st.tuples(st.floats(0.0, 12.0), away), max_size=2))
    return replace(case, killed=killed, stopped=stopped), draw(st.booleans())


def run(drawn: tuple[Case, bool]) -> Outcome:
    case, has_checkpoints = drawn
    with TemporaryDirectory() as folder:
        outcome = simulate(replace(case, folder=Path(folder)) if has_checkpoints else case)
    check_ledger(outcome)
    check_same_everywhere(outcome)
    return outcome


@pytest.mark.parametrize("has_checkpoints", [True, False])
def test_a_worker_a_server_and_the_coordinator_die_at_once(has_checkpoints: bool) -> None:
    settings = Settings(workers=3, servers=2, global_batch=8, micro_batch=2)
    killed = [(name, 3.0, 1.0) for name in ("worker-1", "server-0", "coordinator")]
    case = Case(settings, [Pace(0.1)] * 3, ((48, 3),), killed=killed)
    outcome = run((case, has_checkpoints))
    check_exact(outcome)
    assert outcome.world.killed == 3 and outcome.world.restarts == 1
    (back,) = [event.data["to"] for event in outcome.log.events if event.kind == "rolled back"]
    assert (back > 0) == has_checkpoints
    assert max(round_ for _, round_ in outcome.world.weights) == 17


def test_a_micro_batch_that_is_given_up_takes_along_what_was_computed_before_it_of_its_round() -> None:
    """About every second schedule has a micro-batch that is asked for too late: one must be met soon."""
    random = Random(5)
    assert any(_asked_too_late(random.randrange(200), random.uniform(8.0, 12.0)) for _ in range(12))


def _asked_too_late(seed: int, at: float) -> bool:
    """Whether a micro-batch was asked for when its weights were gone, in a run that kept what it promises."""
    settings = Settings(workers=1, servers=1, global_batch=3, micro_batch=1)
    killed = [
        ("worker-1", at, 20.0),
        ("coordinator", at, 20.0),
        ("worker-1", 0.0, 20.0),
        ("coordinator", 0.2, 0.05),
    ]
    paces = [Pace(0.7), Pace(0.05, starts_s=6.0)]
    case = Case(
        settings,
        paces,
        ((3, 2), (3, 1)),
        Network(0.3, 0, 0.002),
        seed=seed,
        chunk_bytes=400,
        credit=3,
        classes=1000,
        killed=killed,
    )
    outcome = run((case, False))
    check_head(outcome)
    return outcome.world.asked_too_late > 0
    check_exact(outcome)


@some
@given(deaths("sync"))
def test_sync_keeps_its_bits(drawn: tuple[Case, bool]) -> None:
    check_exact(run(drawn))


@few
@given(deaths("sync", chunk_bytes=400, clip_norm=0.5))
def test_with_clipping(drawn: tuple[Case, bool]) -> None:
    check_exact(run(drawn))


@some
@given(deaths("backup", **PLAIN))
def test_backup_counts_a_micro_batch_once_or_drops_it_everywhere(drawn: tuple[Case, bool]) -> None:
    check_dropped_or_counted(run(drawn))


@pytest.mark.parametrize("policy", ["ssp", "async"])
@some
@given(data=st.data())
def test_what_was_applied_at_once_counts_once(policy: str, data: st.DataObject) -> None:
    check_kept(run(data.draw(deaths(policy, **PLAIN))))


@pytest.mark.parametrize("policy", ["sync", "ssp"])
@few
@given(data=st.data())
def test_servers_without_a_part_of_the_model(policy: str, data: st.DataObject) -> None:
    check_kept(run(data.draw(deaths(policy, **SPARE, **({} if policy == "sync" else PLAIN)))))


@pytest.mark.parametrize("policy", ["sync", "backup", "ssp", "async"])
@few
@given(data=st.data())
def test_rows_of_tables(policy: str, data: st.DataObject) -> None:
    plain: dict[str, Any] = {} if policy == "sync" else PLAIN
    check_kept(run(data.draw(deaths(policy, rows=data.draw(st.sampled_from([10, 200])), **plain))))


@pytest.mark.parametrize("policy", ["sync", "backup"])
@few
@given(data=st.data())
def test_sharded_layers(policy: str, data: st.DataObject) -> None:
    outcome = run(data.draw(deaths(policy, classes=data.draw(st.sampled_from([10, 1000])), chunk_bytes=400)))
    check_head(outcome)
    check_kept(outcome)


@few
@given(st.sampled_from(["local", "average"]).flatmap(lambda policy: deaths(policy, after=3, **PLAIN)))
def test_merges_do_not_depend_on_it(drawn: tuple[Case, bool]) -> None:
    """Without momentum, for the replicas' own is in no checkpoint."""
    with every_other_is_chosen():
        outcome = run(drawn)
        quiet = simulate(replace(outcome.case, network=Network(), killed=(), folder=None))
    assert same(next(iter(outcome.models.values())), next(iter(quiet.models.values())))


@few
@given(st.sampled_from(["local", "average"]).flatmap(lambda policy: deaths(policy, merge="samples", **PLAIN)))
def test_local_steps_count_every_micro_batch_by_its_samples(drawn: tuple[Case, bool]) -> None:
    check_local_counts(run(drawn))


@pytest.mark.parametrize("policy", ["ssp", "async"])
@some
@given(data=st.data())
def test_what_is_not_finite_from_some_weights_is_in_the_ledger_as_the_servers_have_it(policy: str, data: st.DataObject) -> None:
    """Workers that compute a micro-batch again, from other weights, may find the other of the two."""
    case, has_checkpoints = data.draw(deaths(policy, rows=data.draw(st.sampled_from([0, 10])), **PLAIN))
    case = replace(case, settings=structs.replace(case.settings, on_nonfinite="skip"))
    chance, compute = Random(case.seed), Model.compute

    def sometimes_infinite(self: Model, task: Task) -> None:
        compute(self, task)
        if chance.random() < 0.3:
            assert self.a.grad is not None
            self.a.grad[0] = float("inf")

    with mock.patch.object(Model, "compute", sometimes_infinite):
        outcome = run((case, has_checkpoints))
    of = {(row.round, row.lo): row.outcome for row in outcome.log.contributions if row.outcome != "duplicate"}
    times = {"committed": {1.0}, "dropped": {0.0}, "dropped in part": {0.0, 1.0}}
    accounts = [next(iter(outcome.models.values()))["account"]]
    accounts += [outcome.table()[case.rows :, 0]] if case.rows else []
    for n, task in enumerate(case.micro_batches()):
        plan = case.round(task.round)
        for account in accounts:
            counted = -float(account[n]) * plan.samples / plan.samples_in(task.k, task.k + 1)
            assert round(counted, 3) in times[of[task.round, task.k]], (task, counted)
