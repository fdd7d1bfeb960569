"""Attendance: ask until welcomed, then beat; notice silence; be refused in the coordinator's words."""

from __future__ import annotations

import itertools
import platform

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roundtable.common.config.settings import START_S, Settings
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.session import Heartbeat, Hello, Refused, Stop, Welcome
from roundtable.common.protocol.session import NEWS_S, TELL_S, Session
from roundtable.common.protocol.transport import ASK_AGAIN_S, HEARTBEAT_S
from roundtable.common.runtime.errors import ClusterError, UsageError

HELLO = Hello("worker", 3)
AWAY_S = Settings().coordinator_timeout
WELCOME = Welcome("worker-3", "run", Settings(), [], [])


def heartbeat() -> Heartbeat:
    return Heartbeat("computing", 7)


def sent(attendance: Session, until: float, step: float = 0.05, since: float = 0.0) -> list[tuple[float, Body]]:
    """Return the messages that go out between two times, with their times."""
    out: list[tuple[float, Body]] = []
    now = since
    while now <= until:
        out += [(now, body) for body in attendance.tick(now, heartbeat)]
        now += step
    return out


def test_it_asks_to_join_until_it_is_welcomed_and_then_beats() -> None:
    attendance = Session(HELLO, "tcp://c:1", 0.0)
    before = sent(attendance, 3.0)
    assert [body for _, body in before] == [HELLO] * len(before)
    assert len(before) == pytest.approx(1 + 3.0 / ASK_AGAIN_S, abs=1)
    attendance.handle(WELCOME, 3.0)
    assert attendance.welcome == WELCOME
    after = sent(attendance, 6.0, since=3.05)
    assert [body for _, body in after] == [heartbeat()] * len(after)
    assert len(after) == pytest.approx(3.0 / HEARTBEAT_S, abs=1)


def test_only_the_first_welcome_counts() -> None:
    attendance = Session(HELLO, "tcp://c:1", 0.0)
    attendance.handle(WELCOME, 1.0)
    attendance.handle(Welcome("worker-9", "other", Settings(), [], []), 2.0)
    assert attendance.welcome == WELCOME


def test_a_refusal_to_join_is_raised_with_its_reason_and_another_is_not() -> None:
    attendance = Session(HELLO, "tcp://c:1", 0.0)
    attendance.handle(Refused("Heartbeat", "no member"), 1.0)
    with pytest.raises(UsageError, match="there is a worker-3"):
        attendance.handle(Refused("Hello", "there is a worker-3 already."), 2.0)


def test_a_coordinator_that_never_answers_is_named() -> None:
    attendance = Session(HELLO, "tcp://c:1", 10.0)
    sent(attendance, 9.9 + START_S, step=0.5, since=10.0)
    with pytest.raises(ClusterError, match=f"tcp://c:1 has not answered for {START_S:.0f} s; .* --start-timeout sets"):
        attendance.tick(10.1 + START_S, heartbeat)


def test_it_has_as_many_seconds_to_answer_as_were_given() -> None:
    attendance = Session(HELLO, "tcp://c:1", 0.0, start_s=30.0)
    sent(attendance, 29.9)
    with pytest.raises(ClusterError, match="30 s"):
        attendance.tick(30.1, heartbeat)


def test_every_ten_seconds_a_line_says_what_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    attendance = Session(HELLO, "tcp://c:1", 0.0)
    sent(attendance, 2 * TELL_S + 1)
    hint = f"; {platform.node()} asks for it: it must listen there (its --listen), and no firewall may close that port"
    assert [record.getMessage() for record in caplog.records] == [
        f"the coordinator at tcp://c:1 has not answered for {seconds} s{hint}" for seconds in (10, 20)
    ]
    caplog.clear()
    since = 2 * TELL_S + 1
    while since < 4 * TELL_S + 5:
        attendance.handle(Heartbeat(awaited="server-1 (1 of 2 servers)"), since)
        sent(attendance, since + 1, since=since)
        since += 1
    assert [record.getMessage() for record in caplog.records] == [
        "waits for the run of tcp://c:1 to start: server-1 (1 of 2 servers)"
    ] * 2
    caplog.clear()
    attendance.handle(WELCOME, since)
    sent(attendance, since + 2 * TELL_S - 1, since=since)
    assert [record.getMessage() for record in caplog.records] == ["the coordinator at tcp://c:1 has not answered for 10 s"]


def test_time_in_which_this_process_was_stopped_is_not_the_coordinators_silence() -> None:
    attendance = Session(HELLO, "tcp://c:1", 0.0)
    attendance.handle(WELCOME, 0.0)
    sent(attendance, 5.0)
    assert attendance.tick(5000.0, heartbeat)


@given(st.lists(st.floats(0.01, AWAY_S - 0.01), max_size=10))
def test_only_silence_longer_than_the_limit_is_an_error(gaps: list[float]) -> None:
    attendance = Session(HELLO, "tcp://c:1", 0.0)
    attendance.handle(WELCOME, now := 0.0)
    for gap in gaps:
        sent(attendance, now + gap, step=0.9, since=now)
        attendance.handle(Heartbeat(), now := now + gap)
    sent(attendance, now + AWAY_S - 0.01, step=0.9, since=now)
    with pytest.raises(ClusterError, match=f"{AWAY_S:.0f} s"):
        attendance.tick(now + AWAY_S + 0.01, heartbeat)


def test_news_makes_the_next_tick_beat_but_not_more_often_than_allowed() -> None:
    attendance = Session(HELLO, "tcp://c:1", 0.0)
    assert not attendance.heartbeat_soon(0.0)  # nobody to tell yet
    attendance.handle(WELCOME, 1.0)
    assert attendance.tick(1.0, heartbeat) == [heartbeat()]
    assert not attendance.heartbeat_soon(1.0 + 0.9 * NEWS_S)
    assert attendance.tick(1.0 + 0.9 * NEWS_S, heartbeat) == []
    assert attendance.heartbeat_soon(1.0 + 1.1 * NEWS_S)
    assert attendance.tick(1.0 + 1.1 * NEWS_S, heartbeat) == [heartbeat()]
    assert attendance.tick(1.0 + 1.2 * NEWS_S, heartbeat) == []


@given(st.lists(st.floats(0.0, 0.2), max_size=60), st.data())
def test_however_much_news_there_is_beats_keep_their_distance(gaps: list[float], data: st.DataObject) -> None:
    attendance = Session(HELLO, "tcp://c:1", 0.0)
    attendance.handle(WELCOME, now := 0.0)
    heartbeats = []
    for gap in gaps:
        now += gap
        if data.draw(st.booleans()):
            attendance.heartbeat_soon(now)
        heartbeats += [now] * len(attendance.tick(now, heartbeat))
    assert all(b - a >= NEWS_S for a, b in itertools.pairwise(heartbeats))
    assert len(heartbeats) >= now // (HEARTBEAT_S + 0.2)


def test_the_end_of_the_run_is_kept() -> None:
    attendance = Session(HELLO, "tcp://c:1", 0.0)
    attendance.handle(Stop(False, "worker-1 failed."), 1.0)
    assert attendance.stop == Stop(False, "worker-1 failed.")


def test_the_word_of_an_earlier_coordinator_does_not_count_once_the_next_one_is_heard() -> None:
    attendance = Session(HELLO, "tcp://c:1", 0.0)
    assert attendance.is_current(9) and attendance.is_current(5)  # who welcomes is not known yet
    attendance.handle(WELCOME, 0.0)
    assert [attendance.is_current(number) for number in (5, 6, 5, 6)] == [True, True, False, True]
