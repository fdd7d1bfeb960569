"""The command line as a user runs it: real coordinators, servers and workers that train, are stopped, killed or fail."""

from __future__ import annotations

import json
import os
import platform
import pty
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import START_S, Launched, wait_for_ends

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch.py"
Start = Callable[..., Launched]

#: Trains until it is stopped, on data that two processes load; says when it does.
ENDLESS = """
import os, sys
import torch
import roundtable

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 640
    def __getitem__(self, index):
        return torch.ones(8), index % 4

run = roundtable.join()
if len(sys.argv) > 1:
    torch.multiprocessing.set_sharing_strategy(sys.argv[1])
model = run.replicate(torch.nn.Linear(8, 4))
opt = run.optimizer(torch.optim.SGD, lr=0.1)
for number, (x, y) in enumerate(run.batches(Data(), num_workers=2, epochs=10**6)):
    torch.nn.functional.cross_entropy(model(x), y).backward()
    opt.step()
    if number == 2:
        with open(os.environ["STUB_READY"], "w") as ready:
            ready.write(f"{run.name} {os.getpid()}\\n")
"""
#: How many processes the run above has: launcher, guard, coordinator, 2 servers, and 2 workers with 2 loaders each.
PROCESSES = 11


@pytest.fixture
def endless(start: Start, tmp_path: Path) -> Callable[..., Launched]:
    """`endless(*args)` starts that script with these arguments and returns when both workers train."""
    (tmp_path / "endless.py").write_text(ENDLESS)

    def begin(*args: str) -> Launched:
        run = start(LAUNCH, "local", "--run-dir", "run", "endless.py", "--", *args)
        run.ready(2)
        return run

    return begin


@pytest.mark.slow
def test_ctrl_c_stops_workers_whose_data_others_load_and_removes_their_shared_memory(endless: Callable[..., Launched]) -> None:
    run = endless("file_system")
    everybody = run.members()
    assert len(everybody) >= PROCESSES
    os.killpg(run.popen.pid, signal.SIGINT)
    code, lines = run.end(START_S)
    assert code == 130 and lines[-1].startswith("stopped by SIGINT after ") and lines[-1].endswith(" local --resume run")
    run.leaves_nothing(everybody)


@pytest.mark.slow
def test_nothing_outlives_a_killed_launcher_of_workers_whose_data_others_load(endless: Callable[..., Launched]) -> None:
    run = endless("file_system")
    everybody = run.members()
    os.kill(run.popen.pid, signal.SIGKILL)
    wait_for_ends(everybody - {run.popen.pid})
    run.end()
    run.leaves_nothing(everybody)


@pytest.mark.slow
def test_killed_workers_whose_data_others_load_and_none_of_which_is_started_again_end_the_run(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS)
    run = start(LAUNCH, "local", "--run-dir", "run", "--max-restarts", 0, "endless.py")
    pids = run.ready(2)
    everybody = run.members()
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    code, lines = run.end(START_S)
    assert code == 1 and re.fullmatch(
        r"error: no worker is left, and none can be restarted: worker-\d was killed by signal 9 \(SIGKILL\); its log is "
        r"run/logs/worker-\d\.log\.",
        lines[-1],
    )
    run.leaves_nothing(everybody)
    assert sorted(path.name for path in (tmp_path / "run").glob("events.sqlite*")) == ["events.sqlite"]


@pytest.mark.slow
@pytest.mark.long
def test_workers_wait_for_a_slow_first_one_for_longer_than_the_timeout_and_say_so(start: Start, tmp_path: Path) -> None:
    slow = "import time\n" + ENDLESS.replace("epochs=10**6", "epochs=1").replace(
        "for number,", "time.sleep(13 * run.is_chief)\nfor number,"
    )
    (tmp_path / "slow.py").write_text(slow.replace("if number == 2", "if False"))
    run = start(LAUNCH, "local", "--workers", 2, "--progress-timeout", 8, "--run-dir", "run", "slow.py")
    code, lines = run.end(START_S)
    assert code == 0, lines
    told = re.compile(rf"waits: worker-0 on {re.escape(platform.node())}, whose weights are the first ones, has not come to its")
    assert told.search((tmp_path / "run/logs/worker-1.log").read_text())


def test_a_script_that_raises_is_told_with_its_line_and_the_traceback_is_in_its_log(start: Start, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import roundtable\nrun = roundtable.join()\nraise ValueError('no more')\n")
    run = start(LAUNCH, "local", "--workers", 1, "--servers", 1, "--run-dir", "run", "train.py")
    code, lines = run.end(START_S)
    assert code == 1 and "Traceback" not in "".join(lines)
    assert lines[-1] == "error: worker-0 failed: ValueError: no more (train.py line 3); its log is run/logs/worker-0.log."
    assert "Traceback" in (tmp_path / "run/logs/worker-0.log").read_text()
    run.leaves_nothing(set())


def test_a_mistake_in_a_setting_that_only_workers_can_see_is_one_sentence_without_traceback(start: Start, tmp_path: Path) -> None:
    run = start(LAUNCH, "local", "--data", "digits", "--image", "3x5x5", "--workers", "1", "--servers", "1", "--run-dir", "run")
    code, lines = run.end(START_S)
    assert code == 2 and lines[-1].startswith("error: worker-0 failed: the images of 'digits' are 1x8x8: leave out --image")
    assert "Traceback" not in "".join(path.read_text() for path in (tmp_path / "run/logs").iterdir())


def test_a_run_on_a_terminal_shows_live_progress_and_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    argv = ["local", "--data", "digits", "--rounds", "200", "--workers", "2", "--run-dir", "run"]
    main, side = pty.openpty()
    popen = subprocess.Popen(
        [sys.executable, str(LAUNCH), *argv],
        cwd=tmp_path,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
        stdin=side,
        stdout=side,
        stderr=side,
        start_new_session=True,
    )
    os.close(side)
    shown = b""
    try:
        while part := os.read(main, 4096):
            shown += part
    except OSError:  # how a terminal says that nobody writes to it any more
        pass
    os.close(main)
    assert popen.wait(START_S) == 0
    text = shown.decode()
    words = ("round 200/200", "epoch 9/9", "samples/s", "loss", "elapsed", "worker-1", "servers")
    assert [word for word in words if word not in text] == []
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor was hidden, and is back
    assert text.rstrip().endswith("the model is in run/model.safetensors")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "address", "events.sqlite", "logs", "model.safetensors", "settings.toml", "checkpoints", "summary.json",
    }  # fmt: skip
    assert sorted(path.stem for path in (tmp_path / "run/logs").iterdir()) == [
        "coordinator", "server-0", "server-1", "worker-0", "worker-1",
    ]  # fmt: skip


def test_a_coordinator_a_server_and_a_worker_that_were_started_by_hand_work_together(start: Start, tmp_path: Path) -> None:
    flags = ["--data", "digits", "--rounds", 5, "--workers", 1, "--servers", 1, "--run-dir", "run"]
    coordinator = start(LAUNCH, "coordinator", *flags, "--listen", "tcp://127.0.0.1:0")
    assert coordinator.popen.stdout is not None
    first = coordinator.popen.stdout.readline()
    address = first.rpartition(" ")[2].strip()
    assert address.startswith("tcp://127.0.0.1:")
    server = start(LAUNCH, "server", "--coordinator", address)
    worker = start(LAUNCH, "worker", ROUNDTABLE_COORDINATOR=address)
    assert [one.end(START_S)[0] for one in (worker, server, coordinator)] == [0, 0, 0]
    assert json.loads((tmp_path / "run/summary.json").read_text())["rounds"] == 5
    with sqlite3.connect(tmp_path / "run/events.sqlite") as log:
        joined = {name for (name,) in log.execute("SELECT process FROM events WHERE kind = 'joined'")}
    log.close()
    assert joined == {"server-0", "worker-0"}


@pytest.mark.slow
def test_an_experiment_is_run_from_the_command_line_into_a_table_and_a_plot(start: Start, tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text(
        "[settings]\ndata = 'digits'\nrounds = 3\nworkers = 1\nservers = 1\n[matrix]\nimage = ['1x8x8', '3x5x5']\n"
    )
    code, lines = start(LAUNCH, "experiment", "e.toml").end(2 * START_S)
    assert code == 1
    assert lines[-1] == "error: 1 of 2 runs failed: 3x5x5; runs/experiments/e/results.md says why."
    table = (tmp_path / "runs/experiments/e/results.md").read_text()
    assert "| 1x8x8 " in table and "leave out --image" in table
    assert (tmp_path / "runs/experiments/e/results.png").stat().st_size > 10_000
