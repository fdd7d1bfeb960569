"""A process that a fork server has made is like one that was started, but for what has been imported already."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from roundtable.cluster.process.children import Processes
from roundtable.common.runtime.restart import AGAIN_VARIABLE

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
was = "numpy" in sys.modules
import numpy
print(json.dumps({"argv": sys.argv, "path": sys.path[0], "was": was, "parent": os.getppid(), "session": os.getsid(0),
    "shown": Path("/proc/self/cmdline").read_text().split(chr(0)), "main": __name__, "env": os.environ.get("TEST_WORD"),
    "cwd": os.getcwd(), "drawn": int(numpy.random.randint(1 << 30)), "stdin": sys.stdin.read()}))
if sys.argv[1] == "wait":
    signal.pause()
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    (tmp_path / "script.py").write_text(SCRIPT)
    with Processes(tmp_path / "logs", {**os.environ, "TEST_WORD": "no"}) as made:
        yield made


def wait_for(processes: Processes, count: int) -> None:
    deadline = time.monotonic() + 30.0
    while len(processes.running()) > count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
        processes.poll()


def test_it_has_its_own_arguments_environment_session_log_and_random_numbers_and_is_our_child(
    processes: Processes, tmp_path: Path
) -> None:
    fork_server = processes.prepare(["numpy", "no.such.module"])
    while fork_server.coming:
        time.sleep(0.01)
    told = []
    for index in range(2):
        argv = [sys.executable, str(tmp_path / "script.py"), str(index), "é", "x" * 2000]
        child = processes.start(f"child-{index}", argv, TEST_WORD=f"word {index}")
        wait_for(processes, 0)
        assert child.code == index
        told.append(json.loads(child.log.read_text()))
        expected = {
            "argv": argv[1:], "path": str(tmp_path), "was": True, "parent": os.getpid(), "session": child.popen.pid,
            "main": "__main__", "env": f"word {index}", "cwd": str(Path.cwd()), "stdin": "",
        }  # fmt: skip
        assert {key: told[-1][key] for key in expected} == expected
        assert told[-1]["shown"][:4] == argv[:4]
    assert told[0]["drawn"] != told[1]["drawn"]


@pytest.mark.parametrize("modules", [["numpy"], []])
def test_a_signal_that_killed_it_is_known_and_so_is_one_without_a_fork_server(
    processes: Processes, tmp_path: Path, modules: list[str]
) -> None:
    fork_server = processes.prepare(modules)
    while fork_server.coming:
        time.sleep(0.01)
    child = processes.start("child", [sys.executable, str(tmp_path / "script.py"), "wait"])
    while not child.log.read_text():
        time.sleep(0.01)
    assert json.loads(child.log.read_text())["was"] == bool(modules)
    os.kill(child.popen.pid, signal.SIGTERM)
    wait_for(processes, 0)
    assert child.code == -signal.SIGTERM
    processes.again(child)
    child.popen.kill()
    assert child.popen.wait(10.0) == -signal.SIGKILL


def test_who_begins_anew_is_started_again_at_once_as_often_as_it_wants(processes: Processes, tmp_path: Path) -> None:
    (tmp_path / "anew.py").write_text(
        "import os, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); "
        "from roundtable.common.runtime.restart import restart\n"
        "print(os.getpid(), flush=True)\n"
        "if Path(sys.argv[2]).read_text().count(chr(10)) < 3: restart()\n"
    )
    for name, env in (("again", {AGAIN_VARIABLE: "1"}), ("in-place", {})):
        log = tmp_path / "logs" / f"{name}.log"
        root = str(Path(__file__).parents[2])
        child = processes.start(name, [sys.executable, str(tmp_path / "anew.py"), root, str(log)], **env)
        wait_for(processes, 0)
        pids = log.read_text().split()
        assert (child.code, len(pids), len(set(pids))) == (0, 3, 3 if env else 1), log.read_text()


def test_one_that_has_failed_is_done_without(processes: Processes, tmp_path: Path) -> None:
    fork_server = processes.prepare(["numpy"])
    while fork_server.coming:
        time.sleep(0.01)
    assert fork_server._process is not None
    os.kill(fork_server._process.pid, signal.SIGKILL)
    child = processes.start("child", [sys.executable, str(tmp_path / "script.py"), "0"])
    wait_for(processes, 0)
    assert (child.code, json.loads(child.log.read_text())["was"]) == (0, False)
