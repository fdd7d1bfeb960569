"""The run directory: which folder a run gets, its lock, and its files."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from roundtable.common.config.settings import Settings, flat
from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage import checkpoint
from roundtable.common.storage.event_log import FILE_NAME, RunLog, RunLogReader
from roundtable.common.storage.private_files import make_run_dir
from roundtable.common.storage.run_files import (
    MODEL_FILE,
    RUNS,
    SAVED_MODELS,
    SETTINGS_FILE,
    SETTINGS_HEADER,
    SUMMARY_FILE,
    How,
    is_run,
)

ADDRESS_FILE = "address"
SCALE_FILE = "scale"
LOGS = "logs"

_FILES = (SETTINGS_FILE, SUMMARY_FILE, MODEL_FILE, ADDRESS_FILE, SCALE_FILE, FILE_NAME)
_SUFFIXES = ("", ".tmp", "-wal", "-shm", "-journal")


def is_folder_name(name: str) -> bool:
    """Return whether `name` is the name of one folder, without a path, and not hidden."""
    return name == Path(name).name and not name.startswith(".") and "\0" not in name and bool(name)


@contextlib.contextmanager
def claim(
    path: Path | None, default: str, overwrite: bool, take_up: Callable[[Path], How] | None = None
) -> Iterator[tuple[Path, How]]:
    """Yield the folder for a run, and what is to be done there. For the time of the context it is locked against other launchers.

    If a run is to begin there, files of other runs are removed first.

    `path` is the folder asked for. None stands for runs/<default>, or for the first of runs/<default>-2, -3, ... that is free.
    With `take_up` it stands for runs/<default> only, and `take_up` decides in the locked folder what is to be done.
    Raises UsageError if the folder is in use, if it is not a run directory, or if it holds a run and `overwrite` is False. Then
    nothing was removed.
    """
    if path is None and not overwrite and take_up is None:
        folder, lock = _next_free(default)
    else:
        folder = path or RUNS / default
        wanted = _lock(folder)
        if wanted is None:
            raise UsageError(f"{folder} is in use by another run: wait for its end, or give another --run-dir or --name.")
        lock = wanted
    try:
        how = "begin" if take_up is None else take_up(folder)
        if how == "resume":
            _remove(folder, (ADDRESS_FILE, SCALE_FILE))  # the coordinator removes the results, once it can go on
        elif how == "begin":
            _make_room(folder, overwrite)
        yield folder, how
    finally:
        os.close(lock)


def passed_over(folder: Path, default: str) -> Path | None:
    """Return the newest unfinished run among runs/<default>, -2, ... before `folder` that can be resumed.

    None if there is none, or if `folder` is not one of these.
    """
    found = None
    for number in itertools.count(1):
        one = RUNS / (default if number == 1 else f"{default}-{number}")
        if one == folder or not one.is_dir():
            return found if one == folder else None
        if not (one / SUMMARY_FILE).exists() and kept(one) and not is_in_use(one):
            found = one
    raise AssertionError("counting does not end")


def _next_free(default: str) -> tuple[Path, int]:
    for number in itertools.count(1):
        folder = RUNS / (default if number == 1 else f"{default}-{number}")
        if folder.is_dir() and not _is_free(folder):
            continue
        lock = _lock(folder)
        if lock is not None and _is_free(folder):
            return folder, lock
        if lock is not None:
            os.close(lock)
    raise AssertionError("counting does not end")


def _is_free(folder: Path) -> bool:
    """Return whether `folder` has nothing worth keeping: it is empty, or its run ended before the first round."""
    return not _contents(folder) or (is_run(folder) and not kept(folder))


def _lock(folder: Path) -> int | None:
    """Make `folder` if need be, lock it, and return its descriptor. None if another process has locked it.

    The lock leaves no file behind.
    """
    try:
        make_run_dir(folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(None, "Permission denied")
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileExistsError:
        raise UsageError(f"{folder} is a file; a run directory must be a folder.") from None
    except OSError as error:
        raise UsageError(f"the run directory {folder} cannot be written: {error.strerror}.") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:
        pass  # a file system without locks: then there is none
    return handle


def _make_room(folder: Path, overwrite: bool) -> None:
    """Remove an earlier run from `folder`, file by file. Never remove a file that a run has not written."""
    if not _contents(folder):
        return
    if not is_run(folder):
        raise UsageError(f"{folder} is not empty and is not a run directory: choose an empty or new folder as --run-dir.")
    if not overwrite and (found := kept(folder)):
        raise UsageError(f"{folder} holds {found} --overwrite to replace it, or another --run-dir or --name.")
    _remove(folder, _FILES)


def kept(folder: Path) -> str:
    """Return the beginning of a sentence on the run in `folder`, if it must not be removed unasked; else ''."""
    if (folder / SUMMARY_FILE).exists():
        return "a finished run: give"
    goes_on = "give --resume auto to resume it,"
    if checkpoint.folders(folder):
        return f"an unfinished run, with checkpoints: {goes_on}"
    if not (folder / FILE_NAME).exists() or not (folder / FILE_NAME).stat().st_size:
        return ""
    try:
        with contextlib.closing(RunLogReader(folder / FILE_NAME)) as log:
            rounds = log.count_rounds()
    except sqlite3.Error:  # its contents are unknown
        return "a run whose event log cannot be read: give"
    return f"an unfinished run, after {rounds} rounds: {goes_on}" if rounds else ""


def _remove(folder: Path, names: Sequence[str]) -> None:
    """Remove the files `names` of an earlier run. With its event log, remove its logs, checkpoints and models too."""
    try:
        for name, suffix in itertools.product(names, _SUFFIXES):
            (folder / (name + suffix)).unlink(missing_ok=True)
        if FILE_NAME in names:
            for log in (folder / LOGS).glob("*.log"):
                log.unlink()
            for path in checkpoint.folders(folder):
                checkpoint.remove(path)
            for model in (folder / SAVED_MODELS).glob("*.safetensors"):
                model.unlink()
    except OSError as error:
        raise UsageError(f"the earlier run in {folder} cannot be removed: {error.strerror}.") from None


def is_in_use(folder: Path) -> bool:
    """Return whether a run goes on in `folder`, so that another process has locked it."""
    lock = _lock(folder)
    if lock is not None:
        os.close(lock)
    return lock is None


def _contents(folder: Path) -> list[str]:
    """Return the names in `folder`, except those of hidden files."""
    try:
        return [path.name for path in folder.iterdir() if not path.name.startswith(".") and path.name != "lost+found"]
    except OSError as error:
        raise UsageError(f"the run directory {folder} cannot be read: {error.strerror}.") from None


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return the summary of the run in `folder`. None if the run has not finished."""
    try:
        summary: dict[str, Any] = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / SUMMARY_FILE} cannot be read: {error}.") from None
    return summary


def write_settings(path: Path, settings: Settings, script: str | None = None, args: Sequence[str] = ()) -> None:
    """Write the file that --config needs to repeat a run. Raises OSError if it cannot be written."""
    path.write_text(SETTINGS_HEADER + to_toml(run_values(settings, script, args)), encoding="utf-8")


def run_values(settings: Settings, script: str | None, args: Sequence[str]) -> dict[str, Any]:
    """Return the values in the settings file of such a run: all that are not None."""
    values = flat(settings)
    if script is not None:
        values |= {"script": script, "args": list(args)}
    return {key: value for key, value in values.items() if value is not None}


def to_toml(values: Mapping[str, Any]) -> str:
    """Return `values`, without None, which TOML lacks, as a flat TOML table."""

    def literal(value: Any) -> str:
        if isinstance(value, list):
            return "[" + ", ".join(map(literal, value)) + "]"
        if isinstance(value, float):
            return repr(value)
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")

    return "".join(f"{key} = {literal(value)}\n" for key, value in values.items())


def tidy_log(folder: Path) -> None:
    """Fold the side files that a killed coordinator leaves into the event log."""
    path = folder / FILE_NAME
    if path.with_name(FILE_NAME + "-wal").exists() or path.with_name(FILE_NAME + "-shm").exists():
        with contextlib.suppress(Exception):  # the log is as readable as before
            RunLog(path).close()
