"""Scripts end the run early (`run.stop`): after the same round everywhere, whoever asks and whoever dies meanwhile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from simulation import Case, Network, Outcome, Pace, WorkerProcess, same, sequential, simulate
from test_rounds_simulated import PLAIN, cases, check_same_everywhere, few, some

from roundtable.common.config.settings import PolicyName, Settings

pytestmark = [pytest.mark.usefixtures("one_thread")]


def check_end(outcome: Outcome) -> int:
    """The run has ended after one round everywhere, and what was done before counts once. Return the number of updates."""
    case, ledger = outcome.case, outcome.ledger
    ends_after = ledger.ends_after
    assert ledger.run_end.worker in outcome.world.processes and "has seen enough" in ledger.run_end.reason
    updates = ledger.planned
    assert updates == ledger.committed == ledger.totals.rounds and 1 <= updates <= max(ends_after, 1)
    assert [row.round for row in outcome.log.rounds] == list(range(updates))
    assert {shard.version for shard in outcome.shards if shard.model.chunks} == {updates}
    outcome = replace(outcome, models=of_those_at_the_end(outcome))
    if outcome.models:
        check_same_everywhere(outcome)
    policy = case.settings.policy
    if policy in ("local", "average"):
        return int(updates)
    done = [task for task in case.micro_batches() if task.round < updates]
    assert ledger.totals.micro_batches_committed + ledger.totals.dropped == len(done)
    if policy == "sync":
        expected = sequential(case)
        assert all(same(expected[updates], model) for model in outcome.models.values())
        assert all(same(expected[t], found) for (_, t), found in outcome.world.weights.items())
    elif policy != "backup":
        model = next(iter(outcome.models.values()))  # under these policies all stay to the end
        assert model["seen"].tolist() == [int(task.round < updates) for task in case.micro_batches()]
        moved = model["account"] != 0
        assert torch.equal(moved, torch.tensor([task.round < updates for task in case.micro_batches()]))
    return int(updates)


def of_those_at_the_end(outcome: Outcome) -> dict[str, dict[str, torch.Tensor]]:
    """The models of the workers that have not broken out of their loop."""
    processes = outcome.world.processes
    found = {}
    for key, model in outcome.models.items():
        process = processes[key]
        assert isinstance(process, WorkerProcess)
        if not process.pace.then_breaks:
            assert process.run.round == outcome.ledger.end
            found[key] = model
    return found


# I29
@pytest.mark.parametrize("policy", ["sync", "backup"])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_if_all_ask_after_the_same_round_the_run_has_just_these(policy: PolicyName, workers: int) -> None:
    settings = Settings(workers=workers, servers=2, policy=policy, global_batch=12, micro_batch=2)
    paces = [Pace(0.1 * (n + 1), ends_round=3) for n in range(workers)]
    outcome = simulate(Case(settings, paces, ((48, 3),), Network(delay_s=0.05), **PLAIN))  # type: ignore[arg-type]
    assert check_end(outcome) == 3
    assert outcome.ledger.end == 3


@pytest.mark.parametrize("policy", ["sync", "backup", "ssp", "async", "local", "average"])
def test_one_asks_and_all_end_after_the_same_round(policy: PolicyName) -> None:
    settings = Settings(workers=3, servers=2, policy=policy, global_batch=12, micro_batch=2, local_steps=2, outer_momentum=0.0)
    paces = [Pace(0.1), Pace(0.2, ends_round=3), Pace(0.1)]
    outcome = simulate(Case(settings, paces, ((48, 1), (48, 2)), **PLAIN))  # type: ignore[arg-type]
    check_end(outcome)
    assert outcome.ledger.end == {"local": 4, "average": 4}.get(policy, outcome.ledger.end)
    assert 3 <= outcome.ledger.end < 12
    assert [event.data["round"] for event in outcome.log.events if event.kind == "ends"] == [outcome.ledger.end]


def test_a_worker_that_joins_after_the_decision_has_no_batch(tmp_path: Path) -> None:
    settings = Settings(workers=2, servers=2, global_batch=8, micro_batch=2)
    paces = [Pace(0.3, ends_round=2), Pace(0.3, ends_round=2), Pace(0.1, starts_s=2.5)]
    outcome = simulate(Case(settings, paces, ((48, 2), (48, 1)), folder=tmp_path))
    assert check_end(outcome) == 2
    assert not [task for worker, task in outcome.world.computed if worker == "worker-2" and task.round >= 2]


@st.composite
def ends(draw: st.DrawFn, policy: str, **more: object) -> Case:
    """A run in which one or several scripts ask for the end, at some moment or round."""
    case = draw(cases(policy, **more))  # type: ignore[arg-type]
    paces = list(case.paces)
    for number in draw(st.lists(st.integers(0, len(paces) - 1), min_size=1, max_size=len(paces), unique=True)):
        ends_round = draw(st.sampled_from([float("inf"), 0.0, 1.0, 2.0]))
        paces[number] = replace(
            paces[number],
            ends_s=draw(st.floats(0.0, 3.0)) if ends_round == float("inf") else float("inf"),
            ends_round=ends_round,
            ends_before_step=draw(st.booleans()),
            then_breaks=number > 0 and policy in ("sync", "backup") and draw(st.booleans()),
        )
    return replace(case, paces=paces)


def has_asked(outcome: Outcome) -> bool:
    """Whether a script has come to ask. If its loop had ended before, it has not."""
    return outcome.ledger.run_end is not None


@pytest.mark.parametrize("policy", ["sync", "backup", "ssp", "async", "local", "average"])
@some
@given(data=st.data())
def test_whoever_asks_wherever_all_end_alike(policy: str, data: st.DataObject) -> None:
    case = data.draw(ends(policy, **({} if policy == "sync" else PLAIN)))
    outcome = simulate(case)
    if has_asked(outcome):
        check_end(outcome)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["sync", "backup", "ssp", "async", "local"])
@few
@given(data=st.data())
def test_whoever_dies_meanwhile_all_end_alike(tmp_path_factory: pytest.TempPathFactory, policy: str, data: st.DataObject) -> None:
    case = data.draw(ends(policy, **({} if policy == "sync" else PLAIN)))
    names = [
        "coordinator",
        *(f"server-{n}" for n in range(case.settings.servers)),
        *(f"worker-{n}" for n in range(len(case.paces))),
    ]
    killed = st.tuples(st.sampled_from(names), st.floats(0.0, 6.0), st.sampled_from([0.05, 1.0, 5.0]))
    case = replace(case, killed=data.draw(st.lists(killed, min_size=1, max_size=3)), near=True)
    outcome = simulate(replace(case, folder=tmp_path_factory.mktemp("run")))
    if has_asked(outcome):
        check_end(outcome)


@pytest.mark.slow
@few
@given(data=st.data())
def test_a_server_with_a_backup_is_replaced_and_knows_the_end(data: st.DataObject) -> None:
    case = data.draw(ends("sync", servers=(2, 3)))
    replaced = data.draw(st.lists(st.tuples(st.integers(0, 1), st.floats(0.0, 3.0), st.sampled_from([0.05, 1.0])), max_size=2))
    case = replace(case, settings=case.settings.__class__(**{**_values(case.settings), "replicas": 1}), replaced=replaced)
    outcome = simulate(case)
    if has_asked(outcome):
        check_end(outcome)


def _values(settings: Settings) -> dict[str, object]:
    return {name: getattr(settings, name) for name in settings.__struct_fields__}
