"""When checkpoints are taken: random servers that get on, answer late, miss a cut or fail."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from roundtable.common.protocol.messages.saving import CheckpointStatus, TakeCheckpoint
from roundtable.ps.coordinator.checkpoint_scheduler import CheckpointScheduler


def test_there_are_none_where_none_are_wanted() -> None:
    cuts = CheckpointScheduler(0.0, now=0.0)
    assert cuts.due({0: 5, 1: 5}, 10, ended=False, now=1e9) is None
    assert cuts.due({0: 10, 1: 10}, 10, ended=True, now=1e9) is None
    assert cuts.has_ended(10)


def test_a_cut_is_ahead_of_everybody_and_no_later_than_the_plan_s_end() -> None:
    cuts = CheckpointScheduler(10.0, now=0.0)
    assert cuts.due({0: 3, 1: 5}, 100, ended=False, now=9.0) is None
    assert 5 < (cuts.due({0: 3, 1: 5}, 100, ended=False, now=10.0) or 0) <= 100
    assert cuts.due({0: 3, 1: 5}, 6, ended=False, now=10.0) == 6
    assert cuts.due({0: 3, 1: 6}, 6, ended=False, now=10.0) is None


def test_the_end_of_a_run_is_kept_once() -> None:
    cuts = CheckpointScheduler(10.0, now=0.0)
    assert not cuts.has_ended(6)
    assert cuts.due({0: 6, 1: 6}, 6, ended=True, now=1.0) == 6
    cuts.begin(6, "t", 1.0)
    cuts.note_status(0, CheckpointStatus(6, "written"), 1.0)
    assert cuts.outcome({0: 6, 1: 6}, 1.0) == ""
    cuts.note_status(1, CheckpointStatus(6, "written"), 1.0)
    assert cuts.outcome({0: 6, 1: 6}, 1.0) == "complete"
    cuts.end("", 1.0)
    assert cuts.has_ended(6) and cuts.due({0: 6, 1: 6}, 6, ended=True, now=100.0) is None


def test_a_run_ends_without_a_checkpoint_that_cannot_be_written() -> None:
    cuts = CheckpointScheduler(10.0, now=0.0)
    cuts.begin(6, "t", 1.0)
    cuts.note_status(0, CheckpointStatus(6, "failed", reason="the disk is full."), 1.0)
    assert cuts.outcome({0: 6}, 1.0) == "the disk is full."
    cuts.end("the disk is full.", 1.0)
    assert cuts.has_ended(6) and cuts.due({0: 6}, 6, ended=True, now=100.0) is None


def test_who_does_not_answer_is_named_after_a_while() -> None:
    cuts = CheckpointScheduler(10.0, now=0.0)
    cuts.begin(6, "t", 0.0)
    cuts.note_status(0, CheckpointStatus(6, "written"), 1.0)
    assert cuts.outcome({0: 6, 1: 6}, 100.0) == ""
    assert "server-1 got no further with the checkpoint of round 6" in cuts.outcome({0: 6, 1: 6}, 1000.0)


def test_a_cut_takes_as_long_as_servers_get_on() -> None:
    """Rounds of ten minutes, and files that take an hour to write."""
    cuts, now = CheckpointScheduler(10.0, now=0.0), 0.0
    cuts.begin(2, "t", now)
    for now in range(1, 600, 10):
        cuts.ask({0: 2, 1: 1}, now)
        cuts.note_status(0, CheckpointStatus(2, "writing", done=7), now)  # it may be done, or wait for server-1 to get there
        cuts.note_status(1, CheckpointStatus(2, "waits", done=3), now)
        assert cuts.outcome({0: 2, 1: 1}, now) == ""
    for now in range(600, 4200, 60):
        cuts.ask({0: 2, 1: 2}, now)
        for server in (0, 1):
            cuts.note_status(server, CheckpointStatus(2, "writing", done=now), now)
        assert cuts.outcome({0: 2, 1: 2}, now) == ""
    for now in range(4200, 4500, 10):
        cuts.ask({0: 2, 1: 2}, now)
        cuts.note_status(0, CheckpointStatus(2, "writing", done=now), now)
        cuts.note_status(1, CheckpointStatus(2, "writing", done=4200), now)  # it answers, and no more
    assert cuts.outcome({0: 2, 1: 2}, now).startswith("server-1 got no further")


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40), st.booleans()), max_size=60), st.integers(1, 3))
# I20
def test_a_complete_checkpoint_was_written_by_all_for_one_round(steps: list[tuple[int, int, bool]], count: int) -> None:
    """Servers move on by themselves; each hears a cut some time, and takes it if it has not passed the round."""
    cuts, now, planned = CheckpointScheduler(1.0, 0.0), 0.0, 400
    versions = dict.fromkeys(range(count), 0)
    waits: dict[int, int] = {}
    written: dict[int, set[int]] = {}
    for server, rounds, hears in steps * 3:
        server %= count
        now += 0.4
        if (round_ := cuts.due(versions, planned, False, now)) is not None:
            assert cuts.in_progress is None and round_ > max(versions.values())
            cuts.begin(round_, "t", now)
        for to, cut in cuts.ask(versions, now):
            assert isinstance(cut, TakeCheckpoint) and cuts.in_progress is not None and cut.round == cuts.in_progress.round
            if hears:
                waits[to] = cut.round
                cuts.note_status(to, CheckpointStatus(cut.round, "waits" if versions[to] < cut.round else "missed"), now)
        versions[server] = min(planned, versions[server] + rounds)
        if (due := waits.get(server)) is not None and versions[server] >= due:
            written.setdefault(due, set()).add(server)
            del waits[server]
            cuts.note_status(server, CheckpointStatus(due, "written"), now)
        outcome = cuts.outcome(versions, now)
        if outcome:
            assert cuts.in_progress is not None
            if outcome == "complete":
                assert written[cuts.in_progress.round] >= set(versions)
            before = cuts.newest
            cuts.end("" if outcome == "complete" else outcome, now)
            assert cuts.newest > before or outcome != "complete"
