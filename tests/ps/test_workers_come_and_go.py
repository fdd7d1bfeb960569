"""Workers that die, are taken for dead, leave and join, over a bad network: every policy keeps its promises, and none hangs."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation import Case, Network, Outcome, Pace, schedules, simulate
from test_rounds_simulated import PLAIN, check_counted_once, check_exact, check_ledger, check_promises

from roundtable.common.config.settings import Settings
from roundtable.common.runtime.errors import ClusterError
from roundtable.common.storage.checkpoint import newest
from roundtable.common.storage.event_log import FILE_NAME, RunLogReader
from roundtable.ps.coordinator.state.failure_detector import NEAR_S

pytestmark = pytest.mark.slow


@st.composite
def fates(draw: st.DrawFn) -> Pace:
    """Events in the life of a worker, at any time from its welcome on: it may not have sent its first weights yet."""
    compute, when = draw(st.sampled_from([0.05, 0.2])), draw(st.sampled_from([0.01, 0.3, 1.0, 2.0, 4.0]))
    return draw(
        st.sampled_from(
            [
                Pace(compute),
                Pace(compute, starts_s=3 * when),
                Pace(compute, dies_s=when),
                Pace(compute, dies_s=when, restart_s=0.5),
                Pace(compute, dies_s=when, restart_s=5.0),
                Pace(compute, leaves_s=when),
                Pace(compute, fails_s=when),
                Pace(compute, starts_s=3 * when, fails_s=0.01),
                Pace(compute, breaks_s=when),
                Pace(compute, cut_off_s=(when, when + 3 * NEAR_S)),
            ]
        )
    )


def case(policy: str, paces: list[Pace], failures: int = 0, **more: Any) -> Case:
    first = sum(pace.starts_s == 0 for pace in paces)
    return Case(
        Settings(workers=first, servers=2, policy=policy, global_batch=10, micro_batch=2, worker_failures=failures),  # type: ignore[arg-type]
        paces,
        segments=[(28, 4), (20, 3)],
        near=True,
        credit=3,
        **more,
        **({} if policy == "sync" else PLAIN),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("policy", ["sync", "backup", "ssp", "async"])
@schedules(2)
@given(data=st.data())
def test_whatever_becomes_of_workers_the_promises_hold(policy: str, data: st.DataObject) -> None:
    paces = data.draw(st.permutations([Pace(0.1), *data.draw(st.lists(fates(), min_size=1, max_size=3))]))
    network = Network(*data.draw(st.sampled_from([(0.0, 0.0, 0.01), (0.05, 0.2, 0.3)])))
    rows, seed = data.draw(st.sampled_from([0, 100])), data.draw(st.integers(0, 1 << 32))
    check_promises(case(policy, paces, failures=3, network=network, seed=seed, rows=rows))


@pytest.mark.parametrize("policy", ["sync", "backup", "ssp", "async"])
@schedules(2)
@given(data=st.data())
def test_workers_that_join_when_all_are_dead_go_on(policy: str, data: st.DataObject) -> None:
    times = st.sampled_from([0.7, 1.0, 1.3, 2.0])
    paces = [Pace(0.05, dies_s=when, restart_s=0.5) for when in data.draw(st.lists(times, min_size=1, max_size=3))]
    check_promises(case(policy, paces, network=Network(0.0, 0.0, 0.3), seed=data.draw(st.integers(0, 1 << 32))))


def check(outcome: Outcome) -> None:
    check_ledger(outcome)
    if outcome.case.settings.policy == "sync":
        check_exact(outcome)
    else:
        check_counted_once(outcome)


@pytest.mark.parametrize("policy", ["sync", "async"])
def test_who_is_taken_for_dead_and_goes_on_is_fenced_and_joins_as_another(policy: str) -> None:
    outcome = simulate(case(policy, [Pace(0.2), Pace(0.2, cut_off_s=(0.5, 5.0))]))
    assert outcome.world.fenced == 1
    assert [event.process for event in outcome.log.events if event.kind == "lost"] == ["worker-1"]
    assert outcome.world.processes["worker-2"].run.name == "worker-2"  # type: ignore[attr-defined]
    assert all(host.lost == {"worker-1"} for host in outcome.hosts)
    assert all("worker-1" not in shard.sender.waiting for shard in outcome.shards)
    check(outcome)


@pytest.mark.parametrize("policy", ["sync", "async"])
@pytest.mark.parametrize("when", [0.01, 1.0])
def test_with_all_workers_dead_the_next_to_join_goes_on(policy: str, when: float) -> None:
    outcome = simulate(case(policy, [Pace(0.1, dies_s=when), Pace(0.1, dies_s=when, restart_s=20.0)], rows=100))
    assert len(outcome.models) == 1
    check(outcome)


def test_who_leaves_early_has_handed_over_what_it_did_and_others_do_the_rest() -> None:
    outcome = simulate(case("sync", [Pace(0.1), Pace(0.1, leaves_s=1.0)]))
    (left,) = [event.data for event in outcome.log.events if event.kind == "left" and event.process == "worker-1"]
    assert left["early"] and left["round"] in (1, 2)  # after a second, of rounds that take half of one
    assert outcome.ledger.totals.micro_batches_recomputed <= 1
    check(outcome)


@pytest.mark.parametrize("policy", ["sync", "ssp", "async"])
@pytest.mark.parametrize("who", [0, 1])
def test_a_script_that_breaks_off_has_left_and_others_do_the_rest(policy: str, who: int) -> None:
    outcome = simulate(case(policy, [Pace(0.1, breaks_s=1.0 if n == who else float("inf")) for n in range(2)]))
    (left,) = [event.data for event in outcome.log.events if event.kind == "left" and event.process == f"worker-{who}"]
    (warning,) = [event.data["text"] for event in outcome.log.events if event.kind == "warning"]
    assert warning.startswith(
        f"worker-{who} left after round {left['round']} of 12, as its script ended; its work was reassigned"
    )
    assert all(host.lost == {f"worker-{who}"} for host in outcome.hosts)
    assert outcome.world.coordinator.summary.made()["left_early"] == {f"worker-{who}": left["round"]}
    check(outcome)


def test_where_all_scripts_break_off_the_run_ends_with_a_checkpoint_of_what_is_done(tmp_path: Path) -> None:
    paces = [Pace(0.1, breaks_s=1.0), Pace(0.1, breaks_s=1.2)]
    with pytest.raises(ClusterError, match=r"^all scripts left the training loop after \d+ of 9 rounds"):
        simulate(short(paces, folder=tmp_path))
    with closing(RunLogReader(tmp_path / FILE_NAME)) as reader:
        assert newest(tmp_path)[0].manifest.round == len(reader.rounds())  # type: ignore[union-attr]
    outcome = simulate(short([Pace(0.1)], folder=tmp_path, resume=True))
    check(outcome)


@pytest.mark.parametrize("policy", ["local", "average"])
def test_where_no_worker_can_be_done_without_a_script_that_breaks_off_ends_the_run(policy: str) -> None:
    with pytest.raises(ClusterError, match=rf"^worker-1 left after round \d of 9, .*policy {policy} needs all workers"):
        simulate(replace(case(policy, [Pace(0.1), Pace(0.1, breaks_s=0.7)]), segments=[(28, 3)]))


def test_where_nobody_waits_others_do_what_a_dead_worker_had_soon_and_not_at_the_end() -> None:
    paces = [Pace(0.3), Pace(0.3), Pace(0.3, dies_s=0.3)]
    outcome = simulate(replace(case("async", paces, chunk_bytes=4800), segments=[(28, 5)]))
    own = [task.round for name, task in outcome.world.computed if name == "worker-0"]
    assert sum(round_ < max(own[:at]) for at, round_ in enumerate(own[: own.index(13)]) if at) >= 3
    check(outcome)


def short(paces: list[Pace], **more: Any) -> Case:
    return replace(case("sync", paces, chunk_bytes=4800), segments=[(28, 3)], **more)


def test_who_is_cut_off_from_a_server_is_given_up_and_others_do_what_it_had() -> None:
    outcome = simulate(short([Pace(0.1), Pace(0.1, fails_s=0.5, finds_no_server=True)]))
    assert [event.data["why"] for event in outcome.log.events if event.kind == "lost"] == ["worker-1 failed: nothing came."]
    assert all(host.lost == {"worker-1"} for host in outcome.hosts)
    check(outcome)


def test_who_does_not_get_the_last_weights_is_given_up_and_the_run_ends() -> None:
    never = 1e6  # nobody waits for its script to end
    deaf = short([Pace(0.1), Pace(0.1, deaf_s=(1.0, never), hangs_s=never)])
    outcome = simulate(replace(deaf, settings=msgspec.structs.replace(deaf.settings, progress_timeout=5.0)))
    lost = [event.data["why"] for event in outcome.log.events if event.kind == "lost"]
    assert lost == ["it has not received the last weights within 5 s."]
    check(outcome)


@pytest.mark.parametrize("paces", [[Pace(0.1, fails_s=0.5, finds_no_server=True)], [Pace(0.1), Pace(0.1, fails_s=1.0)]])
def test_who_fails_otherwise_or_has_nobody_to_do_what_it_had_ends_the_run(paces: list[Pace]) -> None:
    with pytest.raises(ClusterError, match=r"^worker-\d failed: nothing came\.$"):
        simulate(short(paces))


def failed(outcome: Outcome) -> list[str]:
    """How workers have failed that the run went on without."""
    return [event.data["failed"] for event in outcome.log.events if event.kind == "lost"]


@pytest.mark.parametrize("policy", ["sync", "ssp", "async"])
@pytest.mark.parametrize("starts_s", [0.0, 1.0])
def test_who_fails_before_anything_of_it_counts_is_refused_alone(policy: str, starts_s: float) -> None:
    outcome = simulate(case(policy, [Pace(0.1), Pace(0.1, starts_s=starts_s, fails_s=0.001)]))
    assert failed(outcome) == ["beginner"]
    assert outcome.world.coordinator.departures.failed == ["worker-1 failed: nothing came."]
    check(outcome)


def test_failures_in_mid_training_are_admitted_as_often_as_is_allowed() -> None:
    paces = [Pace(0.1), Pace(0.1, fails_s=1.0), Pace(0.1, fails_s=1.5)]
    outcome = simulate(case("sync", paces, failures=2))
    assert failed(outcome) == ["admitted"] * 2 and outcome.world.coordinator.summary.made()["workers_failed"]
    check(outcome)
    with pytest.raises(ClusterError, match=r"^worker-2 failed: nothing came\. \(before it, worker-1 failed: nothing came\.\)$"):
        simulate(case("sync", paces, failures=1))


def test_where_all_fail_at_once_the_run_fails_at_once_and_names_all() -> None:
    with pytest.raises(ClusterError, match=r"^worker-\d failed: .* \(before it, worker-\d failed: nothing came\.\)$"):
        simulate(case("sync", [Pace(0.1, fails_s=0.001), Pace(0.1, fails_s=0.002)]))
