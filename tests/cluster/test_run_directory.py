"""One folder, one run: nothing is overwritten unasked, nothing foreign is removed, no two runs share a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from roundtable.cluster.run.run_directory import LOGS, claim, passed_over, write_settings
from roundtable.common.config.settings import Settings
from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage import checkpoint
from roundtable.common.storage.event_log import FILE_NAME, RoundRow, RunLog
from roundtable.common.storage.run_files import MODEL_FILE, SETTINGS_FILE, SUMMARY_FILE, is_run
from roundtable.ps.coordinator.main import serve


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_run(folder: Path, finished: bool) -> None:
    (folder / LOGS).mkdir(parents=True)
    write_settings(folder / SETTINGS_FILE, Settings())
    (folder / LOGS / "worker-0.log").touch()
    if finished:
        (folder / SUMMARY_FILE).write_text("{}")


def test_a_finished_run_is_kept_unless_told_otherwise() -> None:
    folder = Path("r")
    make_run(folder, finished=True)
    with pytest.raises(UsageError, match="holds a finished run: give --overwrite"), claim(folder, "x", overwrite=False):
        pass
    assert (folder / SUMMARY_FILE).exists()
    with claim(folder, "x", overwrite=True) as (claimed, how):
        assert (claimed, how) == (folder, "begin")
        assert [path.name for path in folder.rglob("*")] == [LOGS]


def test_a_run_that_was_broken_off_before_its_first_round_is_replaced() -> None:
    make_run(Path("r"), finished=False)
    RunLog(Path("r", FILE_NAME)).close()
    with claim(Path("r"), "x", overwrite=False):
        assert not is_run(Path("r"))


def test_a_finished_run_that_cannot_be_resumed_keeps_its_results() -> None:
    folder = Path("r")
    make_run(folder, finished=True)
    (folder / MODEL_FILE).write_text("a model")
    (folder / FILE_NAME).write_text("no log")
    with claim(folder, "x", overwrite=False, take_up=lambda _: "resume") as (claimed, how):
        assert (claimed, how) == (folder, "resume")
        with pytest.raises(UsageError, match="cannot be read"):
            serve(Settings(), "tcp://127.0.0.1:0", folder, "resume")
    assert (folder / MODEL_FILE).read_text() == "a model" and (folder / SUMMARY_FILE).exists()


@pytest.mark.parametrize("what", ["rounds", "checkpoint", "event log that cannot be read"])
def test_what_is_not_finished_is_never_deleted_unasked(what: str) -> None:
    folder = Path("r")
    make_run(folder, finished=False)
    if what == "rounds":
        log = RunLog(folder / FILE_NAME)
        log.round(RoundRow(0, 0, 8, 2, 0, {}))
        log.close()
    elif what == "checkpoint":
        checkpoint.folder_of(folder, 3).mkdir(parents=True)
    else:
        (folder / FILE_NAME).write_bytes(b"SQLite format 3 and no more" * 100)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UsageError, match="--overwrite to replace it, or another --run-dir"), claim(folder, "x", overwrite=False):
        pass
    assert sorted(folder.rglob("*")) == before
    with claim(folder, "x", overwrite=True):
        assert not is_run(folder) and not checkpoint.folders(folder)


def test_files_that_are_no_runs_are_never_touched() -> None:
    Path("r").mkdir()
    Path("r/thesis.tex").touch()
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="is not empty and is not a run directory"), claim(Path("r"), "x", overwrite):
            pass
    make_run(Path("q"), finished=True)
    Path("q/notes.txt").touch()
    with claim(Path("q"), "x", overwrite=True):
        assert Path("q/notes.txt").exists()


def test_without_a_name_each_run_gets_the_next_free_folder() -> None:
    make_run(Path("runs/x"), finished=True)
    make_run(Path("runs/x-2"), finished=True)
    with claim(None, "x", overwrite=False) as (third, _), claim(None, "x", overwrite=False) as (fourth, _):
        assert (third, fourth) == (Path("runs/x-3"), Path("runs/x-4"))


def test_whoever_begins_anew_beside_a_run_that_has_not_finished_is_told_of_it() -> None:
    make_run(Path("runs/x"), finished=False)
    checkpoint.folder_of(Path("runs/x"), 3).mkdir(parents=True)
    make_run(Path("runs/x-2"), finished=True)
    assert passed_over(Path("runs/x-3"), "x") == Path("runs/x")
    assert passed_over(Path("runs/x"), "x") is None
    assert passed_over(Path("elsewhere"), "x") is None


def test_a_folder_in_use_is_refused_to_another_process_until_the_first_ends() -> None:
    code = "from pathlib import Path; from roundtable.cluster.run.run_directory import claim\n"
    code += "with claim(Path('r'), 'x', True): print('had')"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with claim(Path("r"), "x", overwrite=True):
        second = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert "r is in use by another run" in second.stderr.splitlines()[-1]
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "had\n"


@pytest.mark.parametrize(
    ("path", "part"),
    [("file", "is a file"), ("file/r", "cannot be written: Not a directory"), ("/proc/r", "cannot be written")],
)
def test_a_folder_that_cannot_be_had_is_told(path: str, part: str) -> None:
    Path("file").touch()
    with pytest.raises(UsageError, match=part), claim(Path(path), "x", overwrite=False):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_told() -> None:
    Path("r").mkdir(mode=0o500)
    with pytest.raises(UsageError, match="cannot be written: Permission denied"), claim(Path("r"), "x", overwrite=False):
        pass


def test_the_folder_of_a_run_that_ended_before_its_first_round_is_taken_again() -> None:
    make_run(Path("runs/x"), finished=False)
    with claim(None, "x", overwrite=False) as (folder, how):
        assert (folder, how) == (Path("runs/x"), "begin") and not is_run(folder)
    make_run(Path("runs/y"), finished=True)
    with claim(None, "y", overwrite=False) as (folder, _):
        assert folder == Path("runs/y-2")
