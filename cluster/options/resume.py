"""Resumes a run that was stopped, has crashed or has finished. Says how, and which settings may change."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from roundtable.cluster.options.flags import Choice, choose
from roundtable.common.config.settings import flat
from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage import checkpoint
from roundtable.common.storage.checkpoint import Checkpoint
from roundtable.common.storage.event_log import FILE_NAME, Event, RunLogReader
from roundtable.common.storage.run_files import SETTINGS_FILE, SUMMARY_FILE, How

#: Settings that may change on resume: no round computes anything else for it.
_OF_DATA = frozenset({"workers", "servers", "epochs", "rounds", "transport", "num_data_workers"})
_OF_FAULTS = frozenset(
    {
        "replicas",
        "kv_memory",
        "checkpoint_every",
        "keep_checkpoints",
        "heartbeat_timeout",
        "progress_timeout",
        "worker_failures",
        "start_timeout",
        "stop_timeout",
        "coordinator_timeout",
        "stack_dump_after",
    }
)
_FREE = _OF_DATA | _OF_FAULTS
#: Seconds after its end for which a run is not replaced: within them an engine may restart a process that has just ended.
_JUST_NOW_S = 10.0
#: The value of --resume that leaves the choice to the contents of the run directory.
AUTO = "auto"


@dataclass(frozen=True)
class Before:
    """The state of the run in a run directory."""

    #: Committed rounds.
    rounds: int
    #: Planned rounds. 0 before there is a plan.
    planned: int
    #: Seconds since the event log was last written.
    idle_s: float
    #: Whether the coordinator has told all processes that the run is over, or to restart.
    is_over: bool


def look(folder: Path) -> Before | None:
    """Return the state of the run in `folder`. None if no coordinator has written anything.

    Raises UsageError if the event log cannot be read.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    idle_s = _idle_s(path)
    try:
        with closing(RunLogReader(path)) as log:
            events = [event for _, _, event in log.events()]
            rounds = log.count_rounds()
    except sqlite3.Error as error:
        raise UsageError(f"the event log of the run in {path} cannot be read: {error}.") from None
    planned = [int(event.data["rounds"]) for event in events if event.kind == "plan"]
    told: list[Event] = [event for event in events if event.kind in ("started", "recovered", "stopped")]
    return Before(rounds, planned[-1] if planned else 0, idle_s, told[-1].kind == "stopped") if told else None


def _idle_s(path: Path) -> float:
    """Return the seconds since the event log was last written, by the clock of its file system."""
    files = [path, path.with_name(path.name + "-wal")]
    written = max(file.stat().st_mtime for file in files if file.exists())
    try:
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            return max(0.0, os.fstat(probe.fileno()).st_mtime - written)
    except OSError as error:
        raise UsageError(f"the run directory {path.parent} cannot be written: {error.strerror}.") from None


def resumed(
    folder: Path, flags: Mapping[str, Any], script: str | None, args: tuple[str, ...], accept_versions: bool = False
) -> Choice:
    """Return the settings of the run in `folder`, changed by `flags`.

    Raises UsageError if `flags` would make another run of it, if there is no checkpoint, or if another version of this program or
    of torch made the newest checkpoint and `accept_versions` is False.
    """
    now = choose(flags, str(folder / SETTINGS_FILE), script, args)
    _check_same(folder, now, script is not None or bool(args))
    found = _newest(folder)
    if found is None:
        raise UsageError(
            f"{folder} has no checkpoint to resume from: its run stopped before the first one, or had --checkpoint-every 0."
        )
    checkpoint.check_versions(found, accept_versions)
    _check_end(folder, now, found.manifest.round)
    return replace(now, run_dir=folder)


def take_up(folder: Path, choice: Choice, recovers: bool, accept_versions: bool, say: Callable[[str], None]) -> How:
    """Decide whether to begin, resume or recover the run in `folder`, say so by `say`, and return the decision.

    `recovers`: servers and workers may be waiting for a new coordinator. Raises UsageError as `resumed` does, except that a run
    without a checkpoint begins again, with its event log.
    """
    before = look(folder)
    if before is None:
        say(f"starts a run in {folder}")
        return "begin"
    if (folder / SUMMARY_FILE).exists() and (how := _take_up_finished(folder, choice, before, recovers, say)) is not None:
        return how
    changed = _check_same(folder, choice, has_script=not recovers)
    if recovers and not before.is_over and not changed and before.idle_s < choice.settings.coordinator_timeout:
        say(f"recovers the run in {folder}, which stopped {before.idle_s:.0f} s ago at round {before.rounds}")
        return "recover"
    found = _newest(folder)
    if found is None:
        say(f"starts the run in {folder} from the beginning: it stopped at round {before.rounds}, without a checkpoint")
        return "resume"
    checkpoint.check_versions(found, accept_versions)
    _check_end(folder, choice, found.manifest.round)
    further = f", of the {before.rounds} that were done" if before.rounds > found.manifest.round else ""
    say(f"resumes the run in {folder} from the checkpoint of round {found.manifest.round}{further}")
    return "resume"


def _take_up_finished(folder: Path, choice: Choice, before: Before, recovers: bool, say: Callable[[str], None]) -> How | None:
    """Decide as `take_up` does for a run that has finished. Return None if it is to train longer."""
    if choice.overwrite and not (recovers and before.idle_s < _JUST_NOW_S):
        say(f"starts a run in {folder} in place of a finished one")
        return "begin"
    was = choose({}, str(folder / SETTINGS_FILE)).settings
    if (choice.settings.epochs, choice.settings.rounds) != (was.epochs, was.rounds):
        return None
    say(f"the run in {folder} has finished: give more --epochs or --rounds to train longer, or --overwrite to replace it")
    return "nothing"


def _check_same(folder: Path, now: Choice, has_script: bool) -> bool:
    """Return whether settings that may change differ. Raises UsageError if other settings or the script differ."""
    before = choose({}, str(folder / SETTINGS_FILE))
    changed = False
    new_values = flat(now.settings)
    for key, old in flat(before.settings).items():
        new = new_values[key]
        if old != new and key not in _FREE:
            raise UsageError(
                f"--{key.replace('_', '-')} cannot change on resume ({old} -> {new}, in {folder}): drop the flag, or start a new "
                "run."
            )
        changed |= old != new
    if has_script and (before.script, before.args) != (now.script, now.args):
        told = " ".join([before.script or "the built-in example", *before.args])
        raise UsageError(f"the run in {folder} is one of {told}: drop the script and its arguments, or start a new run.")
    return changed


def _newest(folder: Path) -> Checkpoint | None:
    """Return the newest whole checkpoint, or None. Raises UsageError if there are checkpoints and none is whole."""
    found, problems = checkpoint.newest(folder)
    if found is None and problems:
        raise UsageError(f"{folder} has no checkpoint to resume from: {' '.join(problems)}")
    return found


def _check_end(folder: Path, now: Choice, done: int) -> None:
    """Raise UsageError if the run is to end before the round of the checkpoint, `done`."""
    before, was = look(folder), choose({}, str(folder / SETTINGS_FILE)).settings
    rounds, epochs = now.settings.rounds, now.settings.epochs
    if rounds is not None and rounds < done:
        raise UsageError(f"the run in {folder} has done {done} rounds, and --rounds {rounds} is fewer: give more.")
    if before is None or was.rounds is not None or not before.planned or epochs >= was.epochs:
        return
    epochs_done = done * was.epochs / before.planned
    if epochs < epochs_done:
        raise UsageError(f"the run in {folder} has done {epochs_done:.3g} epochs, and --epochs {epochs} is fewer: give more.")


def stop_message(number: int, folder: Path, command: Sequence[str], launch: str = "") -> str:
    """Return the message on a run in `folder` that the signal `number` has stopped: its rounds, and the command that resumes it.

    `command` is the command to show, without --resume. `launch` is the program's file, if this process does not run it.
    """
    done = 0
    with contextlib.suppress(UsageError):
        done = before.rounds if (before := look(folder)) is not None else 0
    newest = checkpoint.finished(folder)
    saved = f"with a checkpoint of round {checkpoint.round_of(newest[-1])}" if newest else "without a checkpoint"
    program = [sys.orig_argv[0], launch or sys.argv[0]]
    words = [*program, command[0], "--resume", str(folder), *command[1:]]
    if not newest:  # --resume RUN would need a checkpoint
        place = ["--config", str(folder / SETTINGS_FILE), "--run-dir", str(folder)]
        words = [*program, command[0], "--resume", AUTO, *place, *command[1:]]
    name = signal.Signals(number).name
    return f"stopped by {name} after {done} rounds, {saved}; resume the run in {folder} with: {shlex.join(words)}"
