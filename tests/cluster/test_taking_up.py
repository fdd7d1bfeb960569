"""One command begins, recovers or resumes a run, as its directory needs, and says which. Nothing is lost."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from roundtable.cluster.options.flags import Choice, choose
from roundtable.cluster.options.resume import resumed, take_up
from roundtable.cluster.run.run_directory import write_settings
from roundtable.common.config.settings import Settings
from roundtable.common.protocol.messages.setup import Setup, Update
from roundtable.common.runtime.errors import UsageError
from roundtable.common.runtime.versions import versions_here
from roundtable.common.storage import checkpoint
from roundtable.common.storage.checkpoint import Manifest
from roundtable.common.storage.event_log import FILE_NAME, Event, RoundRow, RunLog
from roundtable.common.storage.run_files import SETTINGS_FILE, SUMMARY_FILE, How

#: Rounds that were done, of how many, in a run of ten epochs.
ROUNDS, PLANNED = 34, 100


def make_run(folder: Path, saved: int | None = None, stopped: bool = False, finished: bool = False, idle_s: float = 0.0) -> None:
    folder.mkdir()
    write_settings(folder / SETTINGS_FILE, Settings())
    log = RunLog(folder / FILE_NAME)
    log.event(Event("started", "coordinator", {"run": "r"}))
    log.event(Event("plan", "coordinator", {"rounds": PLANNED}))
    for number in range(ROUNDS):
        log.round(RoundRow(number, 0, 8, 2, 0, {}))
    if stopped or finished:
        log.event(Event("stopped", "coordinator", {"ok": finished, "reason": "", "restart": False}))
    log.close()
    if saved is not None:
        place = checkpoint.folder_of(folder, saved)
        place.mkdir(parents=True)
        setup = Setup([], Update("SGD", [{}]))
        checkpoint.write_manifest(
            place, Manifest(run="r", round=saved, servers=1, setup=setup, settings={}, files={}, versions=versions_here())
        )
    if finished:
        (folder / SUMMARY_FILE).write_text("{}")
    then = time.time() - idle_s
    os.utime(folder / FILE_NAME, (then, then))


def decide(folder: Path, recovers: bool = True, **flags: object) -> tuple[How, str]:
    said: list[str] = []
    how = take_up(folder, choose(flags, None), recovers, False, said.append)
    (line,) = said
    return how, line


def test_where_nothing_is_a_run_begins(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    assert decide(folder) == ("begin", f"starts a run in {folder}")
    folder.mkdir()
    RunLog(folder / FILE_NAME).close()
    assert decide(folder)[0] == "begin"


def test_a_coordinator_that_is_gone_for_less_than_the_others_wait_is_replaced_on_any_host(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    make_run(folder, saved=27, idle_s=20)
    assert decide(folder) == ("recover", f"recovers the run in {folder}, which stopped 20 s ago at round 34")
    resumes = f"resumes the run in {folder} from the checkpoint of round 27, of the 34 that were done"
    assert decide(folder, recovers=False) == ("resume", resumes)  # all have ended with their launcher
    assert decide(folder, workers=5) == ("resume", resumes)
    make_run(tmp_path / "long", saved=34, idle_s=61)
    assert decide(tmp_path / "long") == ("resume", f"resumes the run in {tmp_path / 'long'} from the checkpoint of round 34")
    make_run(tmp_path / "stopped", saved=27, stopped=True)
    assert decide(tmp_path / "stopped")[0] == "resume"


def test_a_run_without_a_checkpoint_begins_again_with_its_event_log(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    make_run(folder, stopped=True)
    assert decide(folder) == (
        "resume",
        f"starts the run in {folder} from the beginning: it stopped at round 34, without a checkpoint",
    )
    assert (folder / FILE_NAME).exists()


def test_a_finished_run_is_left_alone_until_it_is_to_be_replaced_or_to_go_on_for_longer(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    make_run(folder, saved=27, finished=True, idle_s=60)
    how, line = decide(folder)
    assert how == "nothing" and "has finished: give more --epochs or --rounds" in line
    assert decide(folder, overwrite=True)[0] == "begin"
    assert decide(folder, epochs=20)[0] == "resume"
    make_run(tmp_path / "now", finished=True)
    assert decide(tmp_path / "now", overwrite=True)[0] == "nothing"  # an engine starts it again that has not heard
    assert decide(tmp_path / "now", recovers=False, overwrite=True)[0] == "begin"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"lr": 0.5}, r"--lr cannot change on resume \(0\.02 -> 0\.5"),
        ({"rounds": 20}, "has done 27 rounds, and --rounds 20 is fewer"),
        ({"epochs": 2}, "has done 2.7 epochs, and --epochs 2 is fewer"),
    ],
)
def test_what_would_be_another_run_is_refused_and_nothing_deleted(
    tmp_path: Path, flags: dict[str, object], sentence: str
) -> None:
    folder = tmp_path / "r"
    make_run(folder, saved=27, stopped=True)
    before = sorted(folder.rglob("*"))
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=sentence):
            decide(folder, overwrite=overwrite, **flags)
    with pytest.raises(UsageError, match=sentence):
        resumed(folder, flags, None, ())
    assert sorted(folder.rglob("*")) == before


def test_damaged_checkpoints_are_told_of_and_not_begun_over(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    make_run(folder, saved=27, stopped=True)
    (checkpoint.folder_of(folder, 27) / checkpoint.MANIFEST_FILE).write_text("{")
    with pytest.raises(UsageError, match=r"no checkpoint to resume from: .*cannot be read"):
        decide(folder)


def test_another_script_is_another_run(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    make_run(folder, saved=27, stopped=True)
    write_settings(folder / SETTINGS_FILE, Settings(), "train.py", ["--deep"])
    for script, args in (("other.py", ("--deep",)), ("train.py", ())):
        with pytest.raises(UsageError, match=r"is one of train\.py --deep"):
            take_up(folder, Choice(Settings(), None, False, 0, script, args), False, False, print)
    assert take_up(folder, Choice(Settings(), None, False, 0, "train.py", ("--deep",)), False, False, print) == "resume"
