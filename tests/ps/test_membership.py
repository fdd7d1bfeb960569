"""Membership: workers that fall silent are told of once and fenced, names are used once, others share the rest."""

from __future__ import annotations

import re
from typing import Literal

import pytest

from roundtable.common.config.settings import Settings
from roundtable.common.network.host_identity import Place
from roundtable.common.policies import load
from roundtable.common.protocol.effects import number_of
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.session import Heartbeat, Hello, MembershipUpdate, MembersLost, Refused, Stop, Welcome
from roundtable.common.protocol.transport import ASK_AGAIN_S
from roundtable.common.runtime.errors import ClusterError
from roundtable.ps.coordinator.state.admission import MOST_UNPROVEN
from roundtable.ps.coordinator.state.failure_detector import FAR_S, NEAR_S, _process
from roundtable.ps.coordinator.state.membership import Membership
from roundtable.ps.coordinator.state.roster import Member

HERE, THERE = Place("here"), Place("there")


def joining(workers: int, **settings: object) -> Membership:
    """A run whose server is there."""
    made = Settings(**{"workers": workers, "servers": 1} | settings)  # type: ignore[arg-type]
    membership = Membership(made, load(made), "run", now=0.0, place=HERE)
    membership.hello(Hello("server", address="tcp://server:1"), 1, 0.0)
    return membership


def started(workers: int, place: Place = HERE, **settings: object) -> Membership:
    membership = joining(workers, **settings)
    for number in range(workers):
        _, answers = membership.hello(Hello("worker", number, host="same", place=place), 10 + number, 0.0)
    assert sorted(name for name, body in answers if isinstance(body, Welcome)) == sorted(membership.members)
    return membership


def lost(membership: Membership) -> list[str]:
    return [name for name, *_ in membership.newly_lost]


def ask(membership: Membership, hello: Hello, incarnation: int, since: float, until: float) -> tuple[str, list[Body]]:
    """Ask to join every half second while the other members beat; the name given, and all that was answered."""
    answers: list[Body] = []
    for half in range(round(2 * since), round(2 * until) + 1):
        for member in [m for m in membership.members.values() if m.active]:
            membership.heartbeat(member.name, Heartbeat("computing", 5), half / 2)
        member, told = membership.hello(hello, incarnation, half / 2)
        answers += [body for name, body in told if not name]
        if member is not None:
            return member.name, answers
    return "", answers


def go_on(membership: Membership, since: float, until: float, *alive: str) -> list[tuple[str, object]]:
    """Half a second after half a second, with signs of life of these; what was to be sent."""
    told: list[tuple[str, object]] = []
    for half in range(round(2 * since) + 1, round(2 * until) + 1):
        for name in alive:
            membership.heartbeat(name, Heartbeat("computing", 5), half / 2)
        told += membership.tick(half / 2)
    return told


# I17, I19
def test_a_worker_that_falls_silent_is_lost_once_and_has_no_share_from_then_on() -> None:
    membership = started(3)
    told = go_on(membership, 0, NEAR_S + 1, "server-0", "worker-0", "worker-2")
    assert [name for name, body in told if isinstance(body, MembershipUpdate)] == ["worker-0", "worker-2"]
    assert lost(membership) == ["worker-1"]
    table = membership.tables[-1]
    assert table.workers == ["worker-0", "worker-2"] and table.from_round > 5
    assert [(name, body) for name, body in told if isinstance(body, MembersLost)] == [
        ("server-0", MembersLost(table.epoch, ["worker-1"], membership.introductions.peers))
    ]
    membership.newly_lost.clear()
    go_on(membership, NEAR_S + 1, NEAR_S + 5, "server-0", "worker-0", "worker-2")
    assert lost(membership) == []


@pytest.mark.parametrize(
    ("place", "settings", "bound"),
    [(HERE, {}, NEAR_S), (THERE, {}, FAR_S), (Place(), {}, FAR_S), (HERE, {"heartbeat_timeout": 6.0}, 6.0)],
)
def test_how_long_a_worker_may_be_silent_depends_on_where_it_is_and_on_the_settings(
    place: Place, settings: dict[str, object], bound: float
) -> None:
    membership = started(2, place, **settings)
    go_on(membership, 0, bound, "server-0", "worker-0")
    assert lost(membership) == []
    go_on(membership, bound, bound + 1, "server-0", "worker-0")
    assert lost(membership) == ["worker-1"]


def test_time_in_which_the_coordinator_itself_was_stopped_is_nobodys_silence() -> None:
    membership = started(2)
    go_on(membership, 0, 1, "server-0", "worker-0", "worker-1")
    membership.tick(1000.0)
    assert lost(membership) == []


# I16, I17
def test_a_lost_worker_is_told_to_restart_and_its_number_is_never_given_again() -> None:
    membership = started(2)
    go_on(membership, 0, NEAR_S + 1, "server-0", "worker-0")
    member, ((to, fence),) = membership.hello(Hello("worker", 1), 11, 5.0)
    assert member is None and to == "" and isinstance(fence, Stop) and fence.restart and "worker-1" in fence.reason
    name, answers = ask(membership, Hello("worker", 1), 20, 5.0, 5.0)
    assert name == "worker-2" and isinstance(answers[0], Welcome)
    go_on(membership, 5, 6, "server-0", "worker-0", "worker-2")
    assert membership.tables[-1].workers == ["worker-0", "worker-2"]
    assert ask(membership, Hello("worker", 2), 21, 5.0, 5.0)[0] == "worker-3"  # nobody else has asked for that number


def test_who_asks_for_the_number_of_one_that_is_alive_waits_and_is_refused_and_of_one_that_has_just_died_is_not() -> None:
    membership = started(2)
    name, answers = ask(membership, Hello("worker", 1), 20, 1.0, 9.0)
    assert not name and answers[0] == Heartbeat() and isinstance(answers[-1], Refused) and "worker-1" in answers[-1].reason
    for half in range(18, 22):
        membership.heartbeat("worker-0", Heartbeat(), half / 2)
    member, told = membership.hello(Hello("worker", 1), 21, 11.0)  # two seconds after the last word of worker-1
    assert member is not None and member.name == "worker-2" and lost(membership) == ["worker-1"]
    assert [body.workers for name, body in told if isinstance(body, MembersLost)] == [["worker-1"]]


def test_before_the_start_the_place_of_a_dead_one_is_free_again() -> None:
    membership = joining(2)
    membership.hello(Hello("worker", 0, place=HERE), 10, 0.0)
    assert membership.hello(Hello("worker", 0, place=HERE), 11, 0.0) == (None, [("", Heartbeat())])
    go_on(membership, 0, NEAR_S + 1, "server-0")
    assert lost(membership) == ["worker-0"]
    for number in (0, 1):
        membership.hello(Hello("worker", number, place=HERE), 20 + number, 5.0)
    assert membership.started and membership.names("worker") == ["worker-0", "worker-1"]
    member, _ = membership.hello(Hello("worker", place=HERE), 10, 5.0)  # it was not dead
    assert member is not None and member.name == "worker-2"


def test_one_that_was_taken_for_dead_by_mistake_may_be_silent_for_twice_as_long() -> None:
    membership = joining(1)
    for incarnation in (10, 11):
        membership.hello(Hello("worker", place=HERE, pid=7), incarnation, 0.0)
        (member,) = [m for m in membership.workers.values() if m.active]
        assert membership.silence_s(member) == NEAR_S * (1 if incarnation == 10 else 2)
        go_on(membership, 0, NEAR_S + 1, "server-0")


def test_with_no_worker_left_the_next_one_gets_all_there_is_to_do_at_once() -> None:
    membership = started(2)
    go_on(membership, 0, NEAR_S + 1, "server-0")
    assert membership.awaits_workers and membership.losses.workers == ["worker-0", "worker-1"]
    membership.hello(Hello("worker"), 20, 5.0)
    assert not membership.awaits_workers
    (table,) = membership.tables
    assert (table.workers, table.from_round, table.epoch) == (["worker-2"], 0, membership.epoch)


def test_who_leaves_early_has_no_share_any_more_and_is_not_waited_for() -> None:
    membership = started(2)
    told = membership.leave("worker-1", early=True)
    assert [name for name, body in told if isinstance(body, MembershipUpdate)] == ["worker-0"]
    assert membership.tables[-1].workers == ["worker-0"]
    go_on(membership, 0, NEAR_S + 1, "server-0", "worker-0")
    assert lost(membership) == []


def test_who_has_ended_and_falls_silent_before_the_run_is_over_is_lost_too() -> None:
    membership = started(2)
    assert membership.leave("worker-1", early=False) == []
    go_on(membership, 0, NEAR_S + 1, "server-0", "worker-0")
    assert lost(membership) == ["worker-1"]


def test_a_lost_replica_breaks_the_run() -> None:
    membership = started(2, policy="local")
    go_on(membership, 0, FAR_S + 1, "server-0", "worker-0")
    assert membership.broken == "worker-1: process 0 on same sent no heartbeat for 15 s."


def test_a_server_that_is_known_to_be_dead_is_not_waited_for_as_long_as_one_that_is_silent() -> None:
    membership = started(1)
    membership.heartbeat("worker-0", Heartbeat(), NEAR_S)
    membership._detector._looked_at = NEAR_S
    membership.tick(NEAR_S + 0.1, lambda hello: False)
    assert not membership.broken
    membership.tick(NEAR_S + 0.2, lambda hello: True)
    assert membership.broken == "server-0: process 0 on  exited."


def test_a_server_that_is_known_to_be_dead_is_replaced_as_soon_as_another_is_there() -> None:
    membership = started(1)
    another = Hello("server", 0, address="tcp://server:2")
    assert membership.hello(another, 2, 0.1, lambda hello: False) == (None, [("", Heartbeat())])
    assert not membership.broken
    membership.hello(another, 2, 0.2, lambda hello: True)
    assert membership.broken.startswith("server-0: process 0 on  has died")
    assert membership.hello(another, 2, 0.3) == (None, [("", Heartbeat())])  # it does not take that place: all restart


def taken_over(*heard_at: float) -> Membership:
    """A run whose coordinator was replaced at time 0, with as many servers, each of whose shards the next one has a copy of."""
    made = Settings(workers=1, servers=len(heard_at), replicas=1)
    before = Membership(made, load(made), "run", now=0.0, place=HERE)
    for number in range(len(heard_at)):
        before.hello(Hello("server", number, f"tcp://server:{number}"), number, 0.0)
    before.hello(Hello("worker", 0, place=HERE), 10, 0.0)
    after = Membership(made, load(made), "run", now=0.0, place=HERE)
    heard = dict(zip(before.servers, heard_at, strict=True))
    kept = [Member(m.name, m.hello, m.incarnation, heard.get(m.name, 4.0)) for m in before.members.values()]
    after.restore(kept, before.tables)
    return after


def test_a_newcomer_without_a_number_takes_the_place_of_a_server_that_is_lost_already() -> None:
    membership = taken_over(4.0, 4.0, 4.0)
    for name in ("server-0", "server-1", "server-2"):
        membership.heartbeat(name, Heartbeat("waiting", 5, replicas_held=[(number_of(name) - 1) % 3]), 4.0)
    membership.dismiss("server-1")
    assert lost(membership) == ["server-1"] and not membership.broken
    member, _ = membership.hello(Hello("server", None, "tcp://server:9"), 20, 4.5)
    assert member is not None and member.name == "server-1" and member.replaces


def test_after_another_coordinator_a_server_is_not_lost_before_it_is_known_whether_there_is_a_copy_of_its_shard() -> None:
    membership = taken_over(-NEAR_S, 4.0, 4.0)
    membership.hello(Hello("server", 0, "tcp://server:9"), 20, 0.05, lambda hello: True)
    membership.tick(0.1, lambda hello: hello.address == "tcp://server:0")
    assert lost(membership) == []
    membership.heartbeat("server-1", Heartbeat("waiting", 5, replicas_held=[0]), 0.2)
    membership.tick(0.3, lambda hello: hello.address == "tcp://server:0")
    assert lost(membership) == ["server-0"] and not membership.broken


def test_after_another_coordinator_servers_that_are_both_dead_are_not_waited_for() -> None:
    membership = taken_over(-NEAR_S, -NEAR_S)
    membership.tick(0.1, lambda hello: True)
    assert "server-0" in lost(membership) and membership.broken


def test_a_replica_that_is_started_again_is_known_to_have_died() -> None:
    membership = started(2, policy="local")
    for half in range(1, 5):
        for name in ("server-0", "worker-0"):
            membership.heartbeat(name, Heartbeat(), half / 2)
    assert membership.hello(Hello("worker", 1), 20, 2.0) == (None, [("", Heartbeat())])
    assert membership.broken.startswith("worker-1: process 0 on same has died")


def test_one_that_joins_late_has_a_share_when_it_has_said_more_than_hello() -> None:
    membership = started(2)
    member, answers = membership.hello(Hello("worker"), 20, 1.0)
    assert member is not None and member.name == "worker-2" and isinstance(answers[0][1], Welcome) and len(answers) == 1
    assert go_on(membership, 1, 2, "server-0", "worker-0", "worker-1") == []
    assert membership.names("worker") == membership.tables[-1].workers == ["worker-0", "worker-1"]
    told = go_on(membership, 2, 3, "server-0", "worker-0", "worker-1", "worker-2")
    assert [name for name, body in told if isinstance(body, MembershipUpdate)] == ["worker-0", "worker-1", "worker-2"]
    assert membership.tables[-1].workers == ["worker-0", "worker-1", "worker-2"]


def test_in_the_place_of_a_replica_that_had_ended_its_script_one_waits_for_the_end() -> None:
    membership = started(2, policy="local")
    assert isinstance(membership.hello(Hello("worker", 2), 99, 1.0)[1][0][1], Refused)
    for name in ("worker-0", "worker-1"):
        membership.leave(name, early=False)
    assert membership.hello(Hello("worker", 1), 100, 1.0) == (None, [("", Heartbeat())])
    assert isinstance(membership.hello(Hello("worker", 2), 101, 1.0)[1][0][1], Refused)
    assert not membership.broken


def test_who_has_not_heard_of_an_epoch_is_told_once_in_a_while() -> None:
    membership = started(2)
    go_on(membership, 0, NEAR_S + 1, "server-0", "worker-0")
    worker, server = membership.members["worker-0"], membership.members["server-0"]
    newest = membership.tables[-1].epoch
    for member in (worker, server):
        told = [at for tenth in range(60) if membership.news(member, newest - 1, at := 10 + tenth / 10) is not None]
        assert told == pytest.approx([10 + ASK_AGAIN_S * n for n in range(6)], abs=0.11)
        assert membership.news(member, newest, 30.0) is None


def test_who_says_nothing_but_hello_is_forgotten_but_for_its_name_and_nobody_hears_of_it() -> None:
    membership = started(1)
    membership.hello(Hello("worker", 7, place=THERE), 20, 0.0)
    assert go_on(membership, 0, FAR_S, "server-0", "worker-0") == [] and lost(membership) == []
    told = go_on(membership, FAR_S, FAR_S + 1, "server-0", "worker-0")
    assert lost(membership) == ["worker-7"] and told == [] and membership.losses.workers == []
    assert membership.workers.keys() == {"worker-0"} and not membership.knows(20)
    for incarnation in (20, 21):  # it is alive, or it is another of that number
        member, _ = membership.hello(Hello("worker", 7), incarnation, FAR_S + 1)
        assert member is not None and member.name == f"worker-{incarnation - 19}"


def test_thousands_who_say_hello_do_not_become_members_and_a_worker_still_joins() -> None:
    membership, incarnation, now = started(2), 1000, 0.0
    names = []
    for _ in range(4):  # each when those before it are forgotten
        for number in range(500):
            incarnation += 1
            member, answers = membership.hello(Hello("worker", [None, 0, number][number % 3], host="x"), incarnation, now)
            assert [name for name, _ in answers] == [""]
            names += [member.name] if member is not None else []
        assert len(membership.members) <= 3 + MOST_UNPROVEN and len(names) % MOST_UNPROVEN == 0
        assert membership.hello(Hello("worker"), 5, now) == (None, [("", Heartbeat())])
        assert go_on(membership, now, now + FAR_S + 1, "server-0", "worker-0", "worker-1") == []
        now += FAR_S + 1
    assert len(set(names)) == len(names) == 4 * MOST_UNPROVEN
    assert (membership.epoch, len(membership.tables), len(membership.members)) == (1, 1, 3)
    member, _ = membership.hello(Hello("worker"), 5, now)
    assert member is not None and member.name not in names
    membership.heartbeat(member.name, Heartbeat("computing"), now)
    membership.tick(now)
    assert membership.tables[-1].workers == ["worker-0", "worker-1", member.name]
    go_on(membership, now, now + FAR_S + 1, "server-0", "worker-0", "worker-1", member.name)
    assert not membership._admission._newcomers


def test_thousands_who_say_hello_before_the_start_are_few_too() -> None:
    membership = joining(2, servers=2)
    for incarnation in range(10, 1000):
        membership.hello(Hello("worker", host="x"), incarnation, 0.0)
    assert len(membership.workers) == 2 + MOST_UNPROVEN
    go_on(membership, 0, FAR_S + 1, "server-0")
    member, _ = membership.hello(Hello("worker"), 5, FAR_S + 1)
    assert member is not None and member.name == "worker-0"


def test_thousands_of_workers_join_one_as_quickly_as_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roundtable.ps.coordinator.state.admission._MOST_MORE", 3000)
    membership, told = started(1), 0
    for number in range(2000):
        member, answers = membership.hello(Hello("worker", number + 1), 100 + number, 0.0)
        assert member is not None
        membership.heartbeat(member.name, Heartbeat("waiting"), 0.0)
        told += len(answers)
    assert told == 2000
    assert len(membership.tick(0.1)) == 2001 and membership.epoch == 2  # one table for all of them


def test_no_more_workers_take_part_than_some_times_those_that_were_expected() -> None:
    membership = started(2)
    for number in range(1000):
        member, answers = membership.hello(Hello("worker"), 100 + number, 0.0)
        if member is None:
            break
        membership.heartbeat(member.name, Heartbeat("computing", 3, not_started=[1, 2, 3]), 0.0)
    ((_, refused),) = answers
    assert isinstance(refused, Refused) and "run run has 72 workers, the most with --workers 2" in refused.reason
    assert len(membership.names("worker")) == 72
    membership.leave("worker-5", early=True)
    assert membership.members["worker-5"].heartbeat == Heartbeat(round=3)  # of one that is gone no more is kept than is needed
    member, _ = membership.hello(Hello("worker"), 5000, 0.0)
    assert member is not None and member.name == "worker-72"


def test_names_of_workers_are_bounded_over_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roundtable.ps.coordinator.state.admission.MOST_NAMES", 20)
    membership = started(2)
    for number in range(30):
        member, answers = membership.hello(Hello("worker"), 100 + number, 0.0)
        if member is not None:
            membership.heartbeat(member.name, Heartbeat("computing"), 0.0)
            membership.leave(member.name, early=True)
    ((_, refused),) = answers
    assert isinstance(refused, Refused) and "has had 20 workers" in refused.reason and len(membership.workers) == 20


def test_processes_that_do_not_join_are_told() -> None:
    membership = joining(3)
    membership.hello(Hello("worker", 1, host="far"), 2, 0.0)
    text = "worker-0 and worker-2 (2 of 3 workers); server-0 on  and worker-1 on far are there"
    assert membership.missing() == text
    with pytest.raises(ClusterError, match=f"{re.escape(text)} did not join within 600 s, as --start-timeout says"):
        membership.tick(601.0)


# I18
def test_who_joins_before_the_others_is_told_who_is_missing() -> None:
    membership = joining(2)
    _, answers = membership.hello(Hello("worker", host="far"), 2, 0.0)
    assert answers == [("", Heartbeat(awaited="worker-1 (1 of 2 workers); server-0 on  and worker-0 on far are there"))]


def test_a_server_whose_place_is_free_is_awaited_by_name_and_host() -> None:
    membership = started(2, replicas=0)
    assert membership.awaited() == ""
    membership.servers["server-0"].lost = True
    assert membership.awaited() == "a replacement of server-0, which was on "


def test_a_process_that_was_taken_for_dead_a_thousand_times_is_watched_no_longer_than_any() -> None:
    membership = started(2)
    member = membership.members["worker-1"]
    membership._detector._alarms[_process(member)] = 5000
    assert membership.silence_s(member) == 60.0


def reached(host: str, network: str, role: Literal["server", "worker"], address: str = "") -> Hello:
    return Hello(role, address=address, host=host, place=Place(network=network))


def refusal(answers: list[tuple[str, Body]]) -> str:
    return next((body.reason for _, body in answers if isinstance(body, Refused)), "")


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:7", "tcp://[::1]:7", "tcp://localhost:7"])
@pytest.mark.parametrize("server_first", [True, False])
def test_a_loopback_address_is_never_told_to_another_host(address: str, server_first: bool) -> None:
    made = Settings(workers=2, servers=1)
    membership = Membership(made, load(made), "run", now=0.0)
    hellos = [reached("a", "A", "server", address), reached("b", "B", "worker")]
    for number, hello in enumerate(hellos if server_first else hellos[::-1]):
        member, answers = membership.hello(hello, 1 + number, 0.0)
        assert (member is None) is (number == 1)
    who = "server-0" if server_first else "this server"
    assert refusal(answers).startswith(f"{who} on a tells others to reach it at {address}, which on b means that host itself: ")


def test_a_loopback_address_is_fine_on_one_network_and_where_nothing_is_known() -> None:
    for place in ("A", ""):
        made = Settings(workers=1, servers=1)
        membership = Membership(made, load(made), "run", now=0.0)
        membership.hello(reached("a", "A", "server", "tcp://127.0.0.1:7"), 1, 0.0)
        membership.hello(reached("b", place, "worker"), 2, 0.0)
        assert membership.started


def test_servers_need_each_other_only_where_they_keep_copies() -> None:
    for replicas, joins in ((0, True), (1, False)):
        made = Settings(workers=1, servers=2, replicas=replicas)
        membership = Membership(made, load(made), "run", now=0.0)
        membership.hello(reached("a", "A", "server", "tcp://127.0.0.1:7"), 1, 0.0)
        member, answers = membership.hello(reached("b", "B", "server", "tcp://10.0.0.2:7"), 2, 0.0)
        assert (member is not None, not refusal(answers)) == (joins, joins)
