"""Whole runs over a bad network that end in the middle and go on from their newest checkpoint on other machines."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from simulation import HEAD, Case, Outcome, Pace, same, sequential, simulate
from test_rounds_simulated import (
    PLAIN,
    SPARE,
    cases,
    check_same_everywhere,
    check_weights,
    coded,
    few,
)

from roundtable.common.config.settings import Settings
from roundtable.common.storage import checkpoint
from roundtable.ps.server.server import _Server

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

#: Other numbers of servers and workers to go on with.
others = st.tuples(st.integers(1, 3), st.integers(1, 3))
#: So many that some servers have no part of a model of few chunks.
more = st.tuples(st.integers(1, 6), st.integers(1, 3))


def go_on(case: Case, servers: int, workers: int) -> Outcome:
    """Run until a checkpoint is there or the run is over, and then from the newest to the end with others."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        simulate(replace(case, folder=folder), until_checkpoint=True)
        found, problems = checkpoint.newest(folder)
        assert not problems
        assert (found is not None) == bool(checkpoint.finished(folder))
        settings = msgspec.structs.replace(case.settings, servers=servers, workers=workers)
        paces = [Pace(0.1)] * workers
        return simulate(replace(case, settings=settings, paces=paces, folder=folder, resume=True, seed=case.seed + 1))


def counted(outcome: Outcome, account: torch.Tensor) -> list[float]:
    """How often each micro-batch was counted, where no round is short of one."""
    case = outcome.case
    tasks = enumerate(case.micro_batches())
    return [-float(account[n]) * (r := case.round(t.round)).samples / r.samples_in(t.k, t.k + 1) for n, t in tasks]


def test_a_server_gives_signs_of_life_while_it_reads_a_checkpoint() -> None:
    case = Case(Settings(workers=2, servers=2, global_batch=8, micro_batch=2), [Pace(0.1)] * 2, ((48, 3),), rows=200)
    with mock.patch.object(_Server, "_show_life", autospec=True, side_effect=_Server._show_life) as breathes:
        outcome = go_on(case, 2, 2)
    readers = {call.args[0]._stamp.sender for call in breathes.mock_calls}
    assert readers == {"server-0", "server-1"} and len(breathes.mock_calls) > 10
    assert torch.equal(outcome.table(), sequential(case)[-1]["table.weight"])


@few
@given(cases("sync"), others)
# I20, I21
def test_sync_gives_the_bits_of_a_plain_loop(case: Case, machines: tuple[int, int]) -> None:
    outcome = go_on(case, *machines)
    expected = sequential(case)[-1]
    assert outcome.models and all(same(expected, model) for model in outcome.models.values())


@few
@given(st.sampled_from(["sync", "ssp", "async"]).flatmap(lambda policy: cases(policy, weighs=True, **PLAIN)), others)
def test_weights_of_micro_batches_are_known_to_who_goes_on(case: Case, machines: tuple[int, int]) -> None:
    outcome = go_on(case, *machines)
    check_weights(outcome)
    if case.settings.policy == "sync":
        expected = sequential(case)[-1]
        assert outcome.models and all(same(expected, model) for model in outcome.models.values())
    moved = next(iter(outcome.models.values()))["account"]
    assert [float(one) < 0.0 for one in moved] == [case.weight(task) > 0.0 for task in case.micro_batches()]


@few
@given(cases("sync", rows=200), others)
def test_rows_of_tables_are_where_the_others_look_for_them(case: Case, machines: tuple[int, int]) -> None:
    outcome = go_on(case, *machines)
    assert torch.equal(outcome.table(), sequential(case)[-1]["table.weight"])


@few
@given(cases("sync", classes=1000), st.integers(1, 3))
def test_sharded_layers_go_on_from_where_they_were(case: Case, workers: int) -> None:
    outcome = go_on(case, case.settings.servers, workers)
    expected = sequential(case)[-1]
    assert torch.equal(outcome.head(), expected[HEAD])
    assert outcome.models and all(same(expected, model) for model in outcome.models.values())


@few
@given(st.sampled_from(["ssp", "async"]).flatmap(lambda policy: cases(policy, **PLAIN)), others)
def test_what_was_applied_ahead_of_a_checkpoint_counts_once(case: Case, machines: tuple[int, int]) -> None:
    outcome = go_on(case, *machines)
    found = counted(outcome, next(iter(outcome.models.values()))["account"])
    assert found == pytest.approx([1.0] * len(found), abs=1e-3)
    check_same_everywhere(outcome)


@few
@given(
    st.sampled_from(["ssp", "async"]).flatmap(lambda policy: cases(policy, classes=200, chunk_bytes=400, **PLAIN)),
    st.integers(1, 3),
)
def test_what_was_applied_ahead_to_sharded_layers_counts_once(case: Case, workers: int) -> None:
    outcome = go_on(case, case.settings.servers, workers)
    for tally in outcome.tallies():
        found = counted(outcome, tally)
        assert found == pytest.approx([1.0] * len(found), abs=0.02)
    check_same_everywhere(outcome)


@pytest.mark.parametrize("policy", ["sync", "ssp", "async", "local"])
@few
@given(data=st.data())
def test_servers_without_a_part_of_the_model_hinder_nobody(policy: str, data: st.DataObject) -> None:
    case = data.draw(cases(policy, **SPARE, **({} if policy == "sync" else PLAIN)))
    outcome = go_on(case, *(data.draw(more) if policy != "local" else (3, case.settings.workers)))
    check_same_everywhere(outcome)
    if policy == "sync":
        assert same(sequential(case)[-1], next(iter(outcome.models.values())))
    elif policy != "local":
        found = counted(outcome, next(iter(outcome.models.values()))["account"])
        assert found == pytest.approx([1.0] * len(found), abs=1e-3)


def check_same_as_undisturbed(case: Case) -> None:
    expected = next(iter(simulate(case).models.values()))
    outcome = go_on(case, case.settings.servers, case.settings.workers)
    assert outcome.models and all(same(expected, model) for model in outcome.models.values())


@few
@given(cases("local", after=3, **PLAIN))
def test_replicas_go_on_from_a_merge(case: Case) -> None:
    check_same_as_undisturbed(case)


@few
@given(cases("sync", {"compress_weights": "int8", "transport": "tcp"}, chunk_bytes=64))
def test_workers_go_on_from_the_rounded_weights_that_they_had(case: Case) -> None:
    check_same_as_undisturbed(case)


@few
@given(coded("sync", "topk", **PLAIN), others)
def test_runs_whose_codec_leaves_something_out_go_on_without_it(case: Case, machines: tuple[int, int]) -> None:
    outcome = go_on(case, *machines)
    assert outcome.models
    check_same_everywhere(outcome)
