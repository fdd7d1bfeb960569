"""However a run on one machine ends, nothing is left of it, and the last line on the screen says why. Children are stubs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launched import Launched, wait_for_ends

from roundtable.cluster.launch.scale import scale
from roundtable.cluster.run.run_directory import SCALE_FILE, write_settings
from roundtable.common.config.settings import Settings
from roundtable.common.network.host_identity import here
from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage.event_log import Event, RunLog
from roundtable.common.storage.run_files import SETTINGS_FILE

pytestmark = pytest.mark.slow

ALL = 4
Stub = Callable[..., Launched]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("whom", ["launcher", "group"])
def test_a_signal_to_the_launcher_or_its_group_stops_everything(stub: Stub, number: signal.Signals, whom: str) -> None:
    run = stub()
    run.ready(ALL)
    (os.kill if whom == "launcher" else os.killpg)(run.popen.pid, number)
    code, lines = run.end()
    assert code == 128 + number
    folder = lines[0].partition(": ")[0]
    assert f"stopped by {number.name} after 0 rounds, without a checkpoint; resume the run in {folder} with: " in lines[-1]
    assert "--resume auto" in lines[-1]
    run.leaves_nothing(set())


def test_a_second_ctrl_c_does_not_disturb_the_stopping(stub: Stub) -> None:
    run = stub(worker_0="stubborn")
    run.ready(ALL)
    for _ in range(3):
        os.kill(run.popen.pid, signal.SIGINT)
    code, lines = run.end()
    assert (code, "SIGINT" in lines[-1], "Traceback" in "".join(lines)) == (130, True, False)
    run.leaves_nothing(set())


def test_a_server_that_is_killed_again_and_again_ends_the_run(stub: Stub) -> None:
    run = stub(restarts="3")
    for count in range(4):
        os.kill(run.ready(ALL + count)["server-0"], signal.SIGKILL)
    code, lines = run.end()
    assert (code, sum("restarting in" in line for line in lines)) == (1, 3)
    assert lines[-1].startswith("error: server-0 was killed by signal 9 (SIGKILL); its log is ")
    run.leaves_nothing(set())


@pytest.mark.parametrize("victim", ["server-0"])
def test_a_child_killed_with_9_ends_the_run_and_is_named_last(stub: Stub, victim: str) -> None:
    run = stub()
    os.kill(run.ready(ALL)[victim], signal.SIGKILL)
    code, lines = run.end()
    assert code == 1
    assert lines[-1].startswith(f"error: {victim} was killed by signal 9 (SIGKILL); its log is ")
    assert lines[-1].endswith(f"/run/logs/{victim}.log.")
    run.leaves_nothing(set())


def test_a_coordinator_killed_with_9_is_started_again_but_not_for_ever(stub: Stub) -> None:
    run = stub()
    for count in range(6):
        pid = run.ready(ALL + count)["coordinator"]
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        assert command.count(b"--prepared=recover") == (count > 0)
        os.kill(pid, signal.SIGKILL)
    code, lines = run.end()
    assert code == 1
    assert sum("the coordinator was killed by signal 9 (SIGKILL); restarting it" in line for line in lines) == 5
    assert lines[-1].startswith("error: coordinator was killed by signal 9 (SIGKILL); its log is ")
    run.leaves_nothing(set())


def test_a_worker_killed_with_9_is_started_again_as_often_as_is_allowed_and_then_the_others_go_on(stub: Stub) -> None:
    run = stub(restarts="1")
    first = run.ready(ALL)
    os.kill(first["worker-1"], signal.SIGKILL)
    again = run.ready(ALL + 1)["worker-1"]
    os.kill(again, signal.SIGKILL)
    os.kill(first["worker-0"], signal.SIGKILL)
    last = run.ready(ALL + 2)["worker-0"]
    assert len({first["worker-1"], again, first["worker-0"], last}) == 4
    os.kill(last, signal.SIGKILL)
    code, lines = run.end()
    told = [line for line in lines if "restart" in line]
    assert told[0] == "worker-1 was killed by signal 9 (SIGKILL); restarting in 0.05 s (restart 1 of 1)."
    assert "worker-1 was killed by signal 9 (SIGKILL); restart limit reached (--max-restarts 1)." in told
    assert code == 1
    assert lines[-1].startswith("error: no worker is left, and none can be restarted: worker-0 was killed by signal 9 (SIGKILL)")
    run.leaves_nothing(set())


def test_who_wants_more_or_fewer_workers_than_a_run_can_have_is_told_why(stub: Stub, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not found: give a run directory"):
        scale(str(tmp_path / "run"), 2)
    run = stub()
    run.ready(ALL)
    folder = tmp_path / "run"
    with pytest.raises(UsageError, match="is not running"):  # a stub's launcher claims no folder
        scale(str(folder), 3)
    with claim_of(folder):
        assert scale(str(folder), 3) == folder
        assert "worker-any" in run.ready(ALL + 1)
        scale(str(folder), 1)
        write_settings(folder / SETTINGS_FILE, Settings(policy="local"))
        with pytest.raises(UsageError, match="policy local"):
            scale(str(folder), 3)
    os.kill(run.popen.pid, signal.SIGTERM)
    code, lines = run.end()
    assert code == 143
    assert "scaled to 3 workers; worker-2 started." in lines
    assert "scaled to 1 worker; worker-1 and worker-2 told to leave." in lines
    run.leaves_nothing(set())


def test_who_wants_more_workers_as_a_run_ends_is_told_that_it_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write_settings(folder / SETTINGS_FILE, Settings())
    with pytest.raises(UsageError, match="has ended meanwhile"), ThreadPoolExecutor(1) as thread:
        with claim_of(folder):
            asked = thread.submit(scale, str(folder), 3)
            while not (folder / SCALE_FILE).exists():
                time.sleep(0.01)
        asked.result(10.0)
    assert not (folder / SCALE_FILE).exists()


@contextlib.contextmanager
def claim_of(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield
    os.close(handle)


@pytest.mark.parametrize("end", ["signal", "kill of a child", "kill of the launcher"])
def test_what_ignores_signals_or_has_left_for_a_session_of_its_own_is_stopped_too(stub: Stub, end: str) -> None:
    run = stub(worker_0="stubborn")
    pids = run.ready(ALL)
    everybody = run.members()
    assert len(everybody) == 1 + ALL + 2 + 2  # launcher, its children, what the stubborn one has started, guard, fork server
    if end == "signal":
        os.kill(run.popen.pid, signal.SIGTERM)
    elif end == "kill of a child":
        os.kill(pids["server-0"], signal.SIGKILL)
    else:
        os.kill(run.popen.pid, signal.SIGKILL)
        wait_for_ends(everybody - {run.popen.pid})
    run.end()
    run.leaves_nothing(set())


# I28
def test_nothing_outlives_a_launcher_that_was_killed_with_9(stub: Stub) -> None:
    run = stub()
    run.ready(ALL)
    everybody = run.members()
    os.kill(run.popen.pid, signal.SIGKILL)
    wait_for_ends(everybody - {run.popen.pid})
    assert run.end()[0] == -signal.SIGKILL
    run.leaves_nothing(set())


def test_a_run_goes_on_without_its_guard_and_its_fork_server_and_ends_well(stub: Stub) -> None:
    run = stub(restarts="1")
    pids = run.ready(ALL)
    helpers = run.members() - set(pids.values()) - {run.popen.pid}
    assert len(helpers) == 2
    for pid in helpers:
        os.kill(pid, signal.SIGKILL)
    os.kill(pids["worker-0"], signal.SIGKILL)
    assert run.ready(ALL + 1)["worker-0"] != pids["worker-0"]
    os.kill(run.popen.pid, signal.SIGTERM)
    assert run.end()[0] == 143
    run.leaves_nothing(set())


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        ("exit 3", "worker-1 failed with exit code 3 and no output"),
        ("fail ValueError: no (train.py line 7)", "worker-1 failed: ValueError: no (train.py line 7)"),
    ],
)
def test_a_worker_that_fails_ends_the_run_with_its_own_word(stub: Stub, action: str, sentence: str) -> None:
    run = stub(worker_1=action)
    code, lines = run.end(60)
    assert code == 1
    assert lines[-1].startswith(f"error: {sentence}; its log is ")
    run.leaves_nothing(set())


def test_a_worker_that_ends_well_without_joining_ends_the_run(stub: Stub) -> None:
    run = stub(worker_0="exit 0")
    code, lines = run.end(60)
    assert code == 1
    assert "worker-0 did not join the run: the example ended without calling roundtable.join()" in lines[-1]
    run.leaves_nothing(set())


def test_a_coordinator_that_ends_at_once_is_told(stub: Stub) -> None:
    run = stub(coordinator="fail tcp://127.0.0.1:1 is in use by another program: choose another port")
    code, lines = run.end(60)
    assert code == 1
    assert lines[-1].startswith("error: coordinator failed: tcp://127.0.0.1:1 is in use by another program")
    run.leaves_nothing(set())


def test_a_run_whose_children_end_well_succeeds_and_leaves_nothing(stub: Stub, tmp_path: Path) -> None:
    run = stub(coordinator="finish", server_0="exit 0", worker_0="exit 0", worker_1="exit 0")
    code, lines = run.end(60)
    assert (code, lines[-1]) == (0, "done: 3 rounds, 30 samples in 1.0 s")
    run.leaves_nothing(set())
    assert sorted(log.name for log in (tmp_path / "run" / "logs").iterdir()) == [
        "coordinator.log", "server-0.log", "worker-0.log", "worker-1.log",
    ]  # fmt: skip


def test_a_server_that_was_killed_just_before_the_end_and_started_again_is_no_failure_of_the_run(
    stub: Stub, tmp_path: Path
) -> None:
    run = stub(coordinator=f"await {tmp_path / 'over'}", restarts="1")
    os.kill(run.ready(ALL)["server-0"], signal.SIGKILL)
    run.ready(ALL + 1)
    (tmp_path / "over").touch()
    code, lines = run.end()
    assert code == 0, lines
    run.leaves_nothing(set())


def test_a_server_that_is_killed_once_the_run_has_ended_well_is_no_failure_of_it(stub: Stub, tmp_path: Path) -> None:
    run = stub(coordinator=f"await {tmp_path / 'over'}", restarts="1")
    there = run.ready(ALL)
    (tmp_path / "over").touch()
    wait_for_ends({there["coordinator"]})
    os.kill(there["server-0"], signal.SIGKILL)
    code, lines = run.end()
    assert code == 0, lines
    run.leaves_nothing(set())


def test_a_reader_that_goes_away_ends_nothing(stub: Stub) -> None:
    run = stub()
    run.ready(ALL)
    everybody = run.members()
    assert run.popen.stdout is not None
    run.popen.stdout.close()
    run.popen.stdout = None
    time.sleep(12.0)  # a line comes every few seconds
    assert run.popen.poll() is None and run.members() == everybody
    run.popen.send_signal(signal.SIGTERM)
    run.popen.send_signal(signal.SIGTERM)
    wait_for_ends(everybody)
    run.leaves_nothing(set())


def test_a_server_that_hangs_is_killed_by_who_has_started_it_and_nobody_else_is(stub: Stub, tmp_path: Path) -> None:
    run = stub(restarts="1")
    pids = run.ready(ALL)
    log = RunLog(tmp_path / "run" / "events.sqlite")
    joined = {"host": "h", "place": here().pids}
    for name, pid in (("server-7", pids["worker-0"]), ("worker-1", os.getpid()), ("server-0", pids["server-0"])):
        log.event(Event("joined", name, {**joined, "pid": pid}))  # the first two lie
        log.event(Event("lost", name, {"why": "silent.", "pid": pid}))
    log.close()
    wait_for_ends({pids["server-0"]})
    run.ready(ALL + 1)
    assert {pids["worker-0"], pids["worker-1"]} <= run.members()
    os.kill(run.popen.pid, signal.SIGTERM)
    _, lines = run.end()
    assert lines.count("server-0 does not respond; killing it.") == 1


def test_a_worker_that_the_coordinator_goes_on_without_does_not_end_the_run(stub: Stub, tmp_path: Path) -> None:
    over = f"await {tmp_path / 'over'}"
    run = stub(coordinator=over, server_0=over, worker_0=over, worker_1="fail RuntimeError: no data (train.py line 3)")
    pids = run.ready(ALL)
    log = RunLog(tmp_path / "run" / "events.sqlite")
    log.event(Event("joined", "worker-1", {"host": "h", "pid": pids["worker-1"], "place": here().pids}))
    log.event(Event("lost", "worker-1", {"why": "worker-1 on h failed: no data", "failed": "beginner", "pid": pids["worker-1"]}))
    log.close()
    assert run.popen.stdout is not None
    told = ""
    while "the others go on" not in told:
        told = run.popen.stdout.readline()
        assert told, "it ended"
    assert told.startswith("worker-1 failed: RuntimeError: no data (train.py line 3); its log is")
    (tmp_path / "over").touch()
    code, _ = run.end()
    assert code == 0
