"""Workers agree on values and evaluate together, whoever computes what, comes late or dies."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation import Case, Network, Pace, WorkerProcess, simulate
from test_rounds_simulated import PLAIN, cases, few, some

from roundtable.common.config.settings import PolicyName, Settings
from roundtable.common.protocol.messages.session import Collective, PartDone
from roundtable.common.runtime.errors import WireError
from roundtable.ps.coordinator.parts.collectives import Collectives, OpenCollective, mean


def evaluation(parts: int) -> Collective:
    return Collective(1, 0, "evaluate", parts, samples=2 * parts)


def result(part: int) -> PartDone:
    return PartDone(part, sums={"loss": (0.1 * (part + 1) * 2, 2.0)} | ({"rare": (0.3, 1.0)} if part % 3 == 2 else {}))


@given(parts=st.integers(1, 30), data=st.data())
def test_each_part_is_done_and_the_outcome_does_not_depend_on_who_does_it(parts: int, data: st.DataObject) -> None:
    known = OpenCollective(evaluation(parts), "worker-0 on a")
    workers = {f"worker-{n}" for n in range(data.draw(st.integers(1, 4)))}
    holds: dict[str, list[int]] = {}
    while known.given:
        worker = data.draw(st.sampled_from(sorted(workers)))
        if len(workers) > 1 and data.draw(st.integers(0, 9)) == 0:
            workers.remove(worker)
            holds.pop(worker, None)
            continue
        twice = data.draw(st.integers(1, 2))
        done = [result(part) for part in holds.pop(worker, [])]
        assert [known.take(done) for _ in range(twice)][1:] in ([], [False])
        given_ = known.give(worker, workers)
        assert len(given_) == len(set(given_)) and set(given_) <= set(known.given)
        assert all(len(set(holders) & workers) <= 2 for holders in known.given.values())
        holds[worker] = given_
    alone = OpenCollective(evaluation(parts), "worker-0 on a")
    alone.take([result(part) for part in range(parts)])
    assert known.outcome() == alone.outcome()
    assert known.outcome().means["loss"] == pytest.approx(sum(0.2 * (k + 1) for k in range(parts)) / (2 * parts))
    assert known.outcome().means.get("rare", 0.3) == pytest.approx(0.3)


def test_a_part_goes_to_another_worker_if_its_own_is_lost_or_the_other_has_nothing_to_do() -> None:
    known = OpenCollective(evaluation(4), "worker-0 on a")
    both = {"worker-0", "worker-1"}
    assert [known.give("worker-0", both), known.give("worker-1", both)] == [[0], [1]]
    assert known.give("worker-1", {"worker-1"}) == [0, 1]  # worker-0 is lost, and this worker has not done its part
    known.take([result(part) for part in (1, 2, 3)])
    assert known.give("worker-1", both) == [0] and known.give("worker-0", both) == [0] and known.give("worker-2", both) == []


@pytest.mark.parametrize(
    ("sums", "expected"),
    [([(1e16, 1), (1.0, 1), (-1e16, 1)], 1 / 3), ([(0.0, 0.0)], math.nan), ([(math.inf, 1.0), (1.0, 1.0)], math.inf)],
)
def test_means_are_rounded_once(sums: list[tuple[float, float]], expected: float) -> None:
    assert mean(sums) == pytest.approx(expected, nan_ok=True)


def test_workers_at_different_places_of_their_scripts_are_told_so() -> None:
    known = OpenCollective(evaluation(4), "worker-0 on a")
    assert known.differs(evaluation(4), "worker-1 on b") == ""
    text = known.differs(Collective(1, 0, "agree", 1), "worker-1 on b")
    assert text.startswith("the script of worker-1 on b is at run.agree() where that of worker-0 on a is at run.evaluate() of 8")


def check_decisions(case: Case) -> None:
    outcome = simulate(case)
    processes = [process for process in outcome.world.processes.values() if isinstance(process, WorkerProcess)]
    finished = [process.decided for process in processes if process.done and len(process.decided) == len(case.segments)]
    assert finished
    for decided in finished:
        for (agreed, means, nothing), (first, first_means, _) in zip(decided, finished[0], strict=True):
            assert agreed == first and means == first_means and nothing is None
    for agreed, means, _ in finished[0]:
        assert agreed["from"].startswith("worker-")
        assert means == {"total": pytest.approx(sum(range(17)) / 17 + 0.1)}


@pytest.mark.parametrize("policy", ["sync", "async", "local", "average"])
def test_all_workers_get_the_same(policy: PolicyName) -> None:
    settings = Settings(workers=3, servers=2, policy=policy, global_batch=12, micro_batch=2, outer_momentum=0.0)
    network = Network(loss=0.2, twice=0.2, delay_s=0.01)
    check_decisions(Case(settings, [Pace(0.1), Pace(0.3), Pace(0.02)], ((24, 1), (24, 2)), network, decides=True, **PLAIN))  # type: ignore[arg-type]


@pytest.mark.slow
@few
@given(data=st.data())
def test_all_workers_get_the_same_whoever_comes_late_or_dies(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    case = data.draw(cases("sync"))
    names = [
        "coordinator",
        *(f"server-{n}" for n in range(case.settings.servers)),
        *(f"worker-{n}" for n in range(len(case.paces))),
    ]
    killed = st.tuples(st.sampled_from(names), st.floats(0.0, 6.0), st.sampled_from([0.05, 1.0]))
    case = replace(case, killed=data.draw(st.lists(killed, max_size=3)), near=True, decides=True)
    check_decisions(replace(case, folder=tmp_path_factory.mktemp("run")))


@some
@given(data=st.data())
def test_all_workers_get_the_same_whoever_joins(data: st.DataObject) -> None:
    check_decisions(replace(data.draw(cases("sync")), decides=True))


@pytest.mark.parametrize("name", ["../../etc/x", "a/b", ".x", "model", "", "x\n", "x" * 90 + "/"])
def test_a_model_is_saved_under_a_plain_name_only(name: str) -> None:
    context: Any = SimpleNamespace(ledger=SimpleNamespace(outcomes={}))
    asked: Any = SimpleNamespace(member=SimpleNamespace(name="worker-1"), body=Collective(1, 0, "save", 1, name), route=b"")
    with pytest.raises(WireError, match="worker-1 wants to save a model under a name that is none"):
        Collectives(context, context, context).at(asked)


def test_no_worker_makes_the_coordinator_keep_parts_without_end() -> None:
    huge = msgspec.msgpack.encode(Collective(1, 0, "evaluate", 1 << 40))
    with pytest.raises(msgspec.ValidationError, match=r"<= 1048576"):
        msgspec.msgpack.decode(huge, type=Collective)
