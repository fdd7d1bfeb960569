"""Output that cannot be written, and names that the locale cannot read, end no run."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from roundtable.cluster.process.output import Forgiving, forgiving_output
from roundtable.cluster.run.console import say

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


class FullDisk(io.StringIO):
    """Takes no text while it is `full`."""

    full = True

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_lines_are_lost_while_a_disk_is_full_and_written_when_it_has_room_again() -> None:
    disk = FullDisk()
    console = Console(file=Forgiving(disk))  # type: ignore[arg-type]
    say(console, "lost")
    disk.full = False
    say(console, "kept")
    assert disk.getvalue() == "kept\n"


def test_what_a_pipe_did_not_take_is_dropped_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with forgiving_output():
            print("nobody reads this")
        assert sys.stdout is pipe
        pipe.flush()  # goes nowhere, and raises nothing


def test_a_run_whose_output_and_names_cannot_be_written_ends_well(tmp_path: Path) -> None:
    command = f"{sys.executable} {ROOT}/launch.py local --run-dir läuft --servers 1 --workers 1 --rounds 2 >/dev/full"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=os.environ | ASCII, stderr=subprocess.PIPE, timeout=180)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "läuft" / "model.safetensors").exists()


def test_a_name_that_is_no_text_at_all_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "launch.py", "inspect", b"l\xe4uft"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | ASCII, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: the name b'l\\xe4uft' is not UTF-8: give it another name, such as 'l_uft'.\n"


def test_a_command_may_be_started_without_standard_output(tmp_path: Path) -> None:
    command = f"exec {sys.executable} {ROOT}/launch.py inspect mlp <&- >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
