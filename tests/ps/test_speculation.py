"""Reassignment, if many workers ask at the same moment."""

from __future__ import annotations

from dataclasses import replace

import pytest

from roundtable.common.config.work_shares import ShareTable
from roundtable.common.protocol.messages.session import Heartbeat, Hello, Reassign
from roundtable.ps.coordinator.state.roster import Member
from roundtable.ps.coordinator.state.speculation import Speculation

TABLES = [ShareTable(1, 0, ["worker-0", "worker-1", "worker-2"], [1, 4, 1])]


def workers(left: list[int], since: float) -> dict[str, Member]:
    """Workers 0 and 2 wait in round 0; worker 1 is at micro-batch 1 since then and has these left."""
    heartbeats = {
        "worker-0": Heartbeat("waiting", 0, seconds=1.0),
        "worker-1": Heartbeat("computing", 0, 1, left, seconds=1.0),
        "worker-2": Heartbeat("waiting", 0, seconds=1.0),
    }
    return {
        name: Member(name, Hello("worker"), number, 0.0, heartbeat, since)
        for number, (name, heartbeat) in enumerate(heartbeats.items())
    }


def test_what_one_was_given_is_not_given_to_who_asks_at_the_same_moment() -> None:
    speculation, members = Speculation(), workers([2, 3, 4], since=0.0)
    given = [speculation.reassign(f"worker-{n}", range(1), lambda _: 6, TABLES, members, now=0.5) for n in (0, 2, 0, 2)]
    assert given == [*(Reassign(0, k, f"worker-{n}", "worker-1") for k, n in ((4, 0), (3, 2), (2, 0))), None]


def test_what_a_late_one_computes_is_given_to_one_other() -> None:
    speculation, members = Speculation(), workers([], since=0.0)
    assert speculation.reassign("worker-0", range(1), lambda _: 6, TABLES, members, now=1.9) is None
    given = [speculation.reassign(f"worker-{n}", range(1), lambda _: 6, TABLES, members, now=2.1) for n in (0, 2)]
    assert given == [Reassign(0, 1, "worker-0", "worker-1"), None]


@pytest.mark.parametrize("elapsed", [0.1, 1.0, 1.7, 1.8, 2.4, 3.0, 4.4, 4.6])
def test_what_a_slow_one_computes_is_given_to_one_that_will_have_done_it_sooner_or_when_it_takes_too_long(elapsed: float) -> None:
    speculation, members = Speculation(), workers([], since=0.0)
    members["worker-1"].heartbeat = Heartbeat("computing", 0, 1, [], seconds=3.0)  # the others take 1 s
    given = speculation.reassign("worker-0", range(1), lambda _: 6, TABLES, members, now=elapsed)
    assert given == (None if 1.75 < elapsed < 4.5 else Reassign(0, 1, "worker-0", "worker-1"))


@pytest.mark.parametrize("seconds", [0.3, 1.0, 3.0])
def test_what_one_may_just_have_begun_is_given_to_one_that_will_have_done_it_sooner(seconds: float) -> None:
    speculation, members = Speculation(), workers([2], since=0.0)
    members["worker-1"].heartbeat = Heartbeat("computing", 0, 1, [2], seconds=seconds)
    members["worker-0"].heartbeat = Heartbeat("waiting", 0, seconds=0.1)  # worker 1 will have done it after twice its time
    given = [speculation.reassign("worker-0", range(1), lambda _: 6, TABLES, members, now=0.9 * seconds) for _ in range(2)]
    # nor does a quick one wait for it at what the slow one is at, if that takes it longer
    assert given[0] == Reassign(0, 2, "worker-0", "worker-1")
    assert given[1] == (Reassign(0, 1, "worker-0", "worker-1") if 0.1 * seconds > 1.25 * 0.1 else None)
    speculation, slow = Speculation(), workers([2], since=0.0)
    slow["worker-1"].heartbeat = members["worker-1"].heartbeat
    slow["worker-0"].heartbeat = Heartbeat("waiting", 0, seconds=seconds)  # it would have done it at about the same time
    assert speculation.reassign("worker-0", range(1), lambda _: 6, TABLES, slow, now=0.9 * seconds) is None


def test_what_is_missing_for_a_second_is_given_once_in_a_while() -> None:
    speculation, members = Speculation(), workers([2, 3, 4], since=0.0)

    def ask(now: float) -> Reassign | None:
        return speculation.reassign_missing("worker-2", 0, iter([0, 2]), 6, TABLES, members, now)

    assert [ask(now) for now in (0.0, 0.9)] == [None, None]
    assert [ask(now) for now in (1.1, 1.1, 2.0, 3.2)] == [
        Reassign(0, 0, "worker-2", ""),
        None,
        None,
        Reassign(0, 0, "worker-2", ""),
    ]


def sent(members: dict[str, Member], micro_batches: list[int], transfer: float) -> dict[str, Member]:
    """The same, but worker 1 waits too, has sent these, and took so many seconds for such before."""
    heartbeat = Heartbeat("waiting", 0, -1, [], micro_batches, 1.0, transfer=transfer)
    return members | {"worker-1": replace(members["worker-1"], heartbeat=heartbeat)}


@pytest.mark.parametrize(("transfer", "believed_s"), [(0.1, 3.0), (2.0, 4.0), (10.0, 20.0), (0.0, 15.0)])
def test_what_was_sent_is_believed_to_be_on_its_way_for_as_long_as_that_may_take(transfer: float, believed_s: float) -> None:
    speculation, members = Speculation(), sent(workers([], since=0.0), [1, 2], transfer)

    def ask(who: str, now: float) -> Reassign | None:
        return speculation.reassign_missing(who, 0, iter([1]), 6, TABLES, members, now)

    assert [ask("worker-0", now) for now in (0.0, believed_s - 0.1, believed_s + 0.1)] == [None, None, None]
    assert ask("worker-1", believed_s + 1.2) is None  # it has sent it itself
    assert ask("worker-0", believed_s + 1.2) == Reassign(0, 1, "worker-0", "")


def test_what_was_sent_is_believed_to_be_on_its_way_while_some_of_it_arrives() -> None:
    speculation, members = Speculation(), workers([], since=0.0)
    for now, left in ((0.0, [1, 2, 3, 4]), (2.5, [2, 3, 4]), (5.0, [3, 4]), (7.5, [4])):
        speculation.reassign_missing("worker-0", 0, iter([4]), 6, TABLES, sent(members, left, 0.1), now)
    members = sent(members, [4], 0.1)
    given = [speculation.reassign_missing("worker-0", 0, iter([4]), 6, TABLES, members, now) for now in (10.4, 10.6, 11.7)]
    assert given == [None, None, Reassign(0, 4, "worker-0", "")]


def at_once(gone: bool, taken: list[tuple[int, int]] | None = None) -> dict[str, Member]:
    """Pushes are applied at once: worker 0 is in round 9, worker 1 in round 2 (or `gone`), and worker 2 in round 5, at what it
    took over of round 1, with these left."""
    heartbeats = {
        "worker-0": Heartbeat("computing", 9, 0, [], seconds=0.1, reached=9),
        "worker-1": Heartbeat("computing", 2, 1, [2, 3, 4], seconds=0.1, reached=2),
        "worker-2": Heartbeat("computing", 1, 5, [], seconds=0.1, reached=5, reassigned_here=taken or []),
    }
    members = {
        name: Member(name, Hello("worker"), n, 0.0, heartbeat, 0.0) for n, (name, heartbeat) in enumerate(heartbeats.items())
    }
    members["worker-1"].lost = gone
    return members


#: What servers lack: of round 1 what worker 2 is at; of round 2 all that worker 1 has; of later ones its run and somebody's.
LACKING = {1: {5}, 2: {1, 2, 3, 4}, 3: {0, 1, 2, 3, 4}, 7: {1, 2, 3, 4, 5}}


def deal(speculation: Speculation, members: dict[str, Member], *times: float) -> list[set[tuple[int, int]]]:
    reassignments = [speculation.assign_orphans(LACKING, lambda _: 6, TABLES, members, now) for now in times]
    return [{(reassignment.round, reassignment.micro_batch) for reassignment in given} for given in reassignments]


def test_of_all_open_rounds_what_nobody_will_do_is_dealt_out_without_anybody_waiting() -> None:
    speculation = Speculation()
    given = deal(speculation, at_once(gone=False), 0.0, 0.9, 1.1, 1.4)
    assert given == [set(), set(), {(3, 0)}, set()]  # 5 of round 7 is worker 2's, who has not got there yet
    assert speculation.reassigned == {(3, 0): "worker-2"}


def test_all_of_one_that_is_gone_is_dealt_out_to_those_who_have_got_so_far_in_portions() -> None:
    speculation, members = Speculation(), at_once(gone=True)
    given = deal(speculation, members, 0.0, 1.1)
    assert given == [set(), {(2, k) for k in (1, 2, 3, 4)} | {(3, k) for k in range(5)} | {(7, 1)}]
    shares = [sum(to == name for to in speculation.reassigned.values()) for name in ("worker-0", "worker-2")]
    assert shares == [5, 5] and speculation.reassigned[7, 1] == "worker-0"
    taken = [key for key, to in speculation.reassigned.items() if to == "worker-2"]
    assert (7, 1) in deal(speculation, at_once(gone=True, taken=taken), 3.2)[0]  # word of that was lost


def test_what_servers_have_got_is_not_taken_over_from_one_that_is_gone() -> None:
    members = at_once(gone=True)
    members["worker-0"].heartbeat = Heartbeat("waiting", 9, seconds=0.1, reached=9)
    speculation = Speculation()
    given = [speculation.reassign("worker-0", range(1, 10), lambda _: 6, TABLES, members, 0.0, {7: {3, 5}}) for _ in range(3)]
    assert given == [Reassign(7, 3, "worker-0", "worker-1"), None, None]  # 5 is worker 2's, who is about to do it


def test_what_was_reassigned_from_one_that_hangs_is_dealt_out_when_word_of_that_was_lost() -> None:
    speculation, members = Speculation(), at_once(gone=False)
    speculation.reassigned[3, 1] = "worker-0"  # of worker 1's run, long ago; worker 0 does not know of it
    speculation._reassigned_at[3, 1] = -10.0
    assert deal(speculation, members, 0.0, 1.1) == [set(), {(3, 0), (3, 1)}]


def test_what_one_that_hangs_took_over_is_given_to_another() -> None:
    speculation, members = Speculation(), workers([], since=0.0)
    speculation.reassigned[0, 1] = "worker-1"
    given = [speculation.reassign(f"worker-{n}", range(1), lambda _: 6, TABLES, members, now=2.1) for n in (0, 2)]
    assert given == [Reassign(0, 1, "worker-0", "worker-1"), None]
