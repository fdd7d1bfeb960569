"""A process whose script fails or ends, or in which a person begins another run at a prompt."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from roundtable.common.runtime.errors import ClusterError, UsageError
from roundtable.worker import joining
from roundtable.worker.session.participation import Participation


class StubSession:
    """A session of which a test says how far it is. It notes what is done with it."""

    def __init__(self, under_way: bool = False, trained: bool = True) -> None:
        self.round, self.is_under_way, self.has_trained = 2, under_way, trained
        self.failure, self.interrupted, self.cut_off, self.left_early, self.stop_signal = "", False, False, False, 0
        self.after_end = lambda: None
        self.left = 0

    def leave_cluster(self) -> None:
        self.left += 1

    def finish(self) -> None:
        self.leave_cluster()
        self.after_end()

    def on_stop_signal(self, number: int, frame: object = None) -> None: ...
    def leave(self) -> None: ...


class StubCompanions:
    folder = "runs/mine"

    def __init__(self, why: str = "") -> None:
        self.why, self.did = why, ""

    def stop(self) -> None:
        self.did += "stop "

    def end(self, stop_signal: int) -> str:
        self.did += "end "
        return self.why


@pytest.fixture
def at_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)


@pytest.fixture(autouse=True)
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BaseException]]:
    """Catch errors that are shown to a person."""
    shown: list[BaseException] = []

    def show(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        shown.append(error)
        sys.last_value = error

    monkeypatch.setattr(sys, "excepthook", show)
    monkeypatch.setattr(sys, "last_value", None, raising=False)
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    yield shown
    for number, handler in handlers:
        signal.signal(number, handler)


def part(session: StubSession, companions: StubCompanions | None = None) -> Participation:
    return Participation(session, companions)  # type: ignore[arg-type]


def fail(error: BaseException) -> None:
    sys.excepthook(type(error), error, None)


@pytest.mark.usefixtures("at_prompt")
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_error_in_a_loop_at_a_prompt_ends_the_run_and_all_that_belongs_to_it(
    error: BaseException, hook: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    before, session, companions = sys.excepthook, StubSession(under_way=True), StubCompanions()
    own = part(session, companions)
    fail(error)
    assert (session.interrupted, session.failure) == (
        (True, "") if isinstance(error, KeyboardInterrupt) else (False, "ValueError: no")
    )
    assert (session.left, companions.did, hook, sys.excepthook) == (1, "stop ", [error], before)
    assert capsys.readouterr().err == "the run in runs/mine is given up after round 2; roundtable.join() begins another.\n"
    own.make_way()
    assert session.left == 1


@pytest.mark.usefixtures("at_prompt")
def test_an_error_between_two_loops_at_a_prompt_is_no_failure_of_the_run(hook: list[BaseException]) -> None:
    session, companions = StubSession(), StubCompanions()
    own = part(session, companions)
    fail(NameError("typo"))
    assert (session.failure, session.left, len(hook)) == ("", 0, 1)
    own.make_way()  # all that was begun is done
    assert (session.left, companions.did, session.interrupted) == (1, "end ", False)


@pytest.mark.usefixtures("at_prompt")
def test_a_run_in_which_nothing_was_trained_makes_way_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    session, companions = StubSession(trained=False), StubCompanions()
    session.round = 0
    part(session, companions).make_way()
    assert (session.left, companions.did, session.interrupted, capsys.readouterr().err) == (1, "stop ", True, "")


@pytest.mark.usefixtures("at_prompt")
def test_a_loop_that_is_under_way_is_no_place_to_join_unless_an_error_has_left_it() -> None:
    session, companions = StubSession(under_way=True), StubCompanions()
    own = part(session, companions)
    with pytest.raises(UsageError, match=r"already, which is in round 2: let its loop over batches\(\) end, or call run\.finish"):
        own.make_way()
    sys.last_value = ValueError("shown by %run, which calls no hook")
    own.make_way()
    assert (session.failure, session.left, companions.did) == ("ValueError: shown by %run, which calls no hook", 1, "stop ")


def test_a_script_that_finishes_a_run_is_told_why_it_is_not_finished_and_has_its_handlers_back() -> None:
    before = signal.getsignal(signal.SIGTERM), sys.excepthook
    session = StubSession()
    part(session, StubCompanions("the coordinator failed."))
    assert signal.getsignal(signal.SIGTERM) == session.on_stop_signal
    with pytest.raises(ClusterError, match=r"^the run is not finished: the coordinator failed\.$"):
        session.finish()
    assert (signal.getsignal(signal.SIGTERM), sys.excepthook) == before


def test_an_error_of_a_script_is_noted_and_shown(hook: list[BaseException]) -> None:
    session, companions = StubSession(under_way=True), StubCompanions()
    part(session, companions)
    error = ValueError("no\nmore")
    fail(error)
    assert (session.failure, session.left, companions.did, hook) == ("ValueError: no", 0, "", [error])
    session.after_end()


def test_a_script_of_a_launcher_joins_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUNDTABLE_COORDINATOR", "tcp://127.0.0.1:1")
    own = part(StubSession())
    monkeypatch.setattr(joining, "_participations", [own])
    with pytest.raises(UsageError, match=r"^this script has joined a run already"):
        joining.join()
    own._session.after_end()
