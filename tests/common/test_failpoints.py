"""A process fails where its environment says, in that round or later, and once in a run directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from roundtable.common.runtime.errors import UsageError
from roundtable.common.runtime.failpoints import VARIABLE, arm, failpoint

#: Comes to two points in rounds 0 to 4, and tells of each that it has passed.
SCRIPT = """
import sys
from pathlib import Path
from roundtable.common.runtime.failpoints import arm, failpoint
arm("worker-0", Path(sys.argv[1]))
for round_ in range(5):
    for phase in ("computing", "pushed"):
        failpoint(phase, round_)
        print(phase, round_, flush=True)
"""


def run(tmp_path: Path, failpoints: str) -> tuple[int, list[str]]:
    env = {**os.environ, VARIABLE: failpoints}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60)
    return result.returncode, result.stdout.splitlines()


def test_a_process_is_killed_at_its_point_and_not_again_when_it_is_started_again(tmp_path: Path) -> None:
    failpoints = "worker-0:pushed:2:kill;worker-1:computing:0:kill"
    code, passed = run(tmp_path, failpoints)
    assert (code, passed[-1]) == (-signal.SIGKILL, "computing 2")
    code, passed = run(tmp_path, failpoints)
    assert (code, passed[-1]) == (0, "pushed 4")


def test_of_several_failures_each_happens(tmp_path: Path) -> None:
    failpoints = "worker-0:pushed:2:kill;worker-0:computing:4:kill"
    assert [run(tmp_path, failpoints)[1][-1] for _ in range(3)] == ["computing 2", "pushed 3", "pushed 4"]


@pytest.mark.parametrize(
    "text", ["worker-0:pushed:2", "worker-0:nowhere:2:kill", "worker-0:pushed:x:kill", "worker-0:pushed:2:hop"]
)
def test_what_is_no_failpoint_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(UsageError, match="it must be process:point:round:action"):
        arm("worker-0", tmp_path)


def test_without_any_a_point_does_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    arm("worker-0", tmp_path)
    failpoint("pushed", 10)
    assert not list(tmp_path.iterdir())
