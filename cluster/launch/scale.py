"""Changes the number of workers of a launcher's run, by a file that the launcher takes away."""

from __future__ import annotations

import os
import time
from pathlib import Path

from roundtable.cluster.options.flags import choose
from roundtable.cluster.process.children import TICK_S
from roundtable.cluster.run.run_directory import SCALE_FILE, is_in_use
from roundtable.common.policies import load
from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage.run_files import SETTINGS_FILE, find_run

#: Seconds for the launcher to take the file.
_TAKEN_S = 30.0


def scale(run: str, workers: int) -> Path:
    """Ask the launcher of `run` for `workers` workers, and return the run's folder.

    Raises UsageError if there is no such run, if it does not run, if its policy has a fixed number of workers, or if no launcher
    takes the request.
    """
    folder = find_run(run)
    if not is_in_use(folder):
        raise UsageError(f"the run in {folder} is not running: only a running run can be scaled.")
    settings = choose({}, str(folder / SETTINGS_FILE)).settings
    if load(settings).is_local:
        raise UsageError(
            f"the run in {folder} has policy {settings.policy}, which has a fixed number of workers: it cannot be scaled."
        )
    file = folder / SCALE_FILE
    temporary = folder / f".{SCALE_FILE}-{os.getpid()}"
    try:
        temporary.write_text(f"{workers}\n", encoding="utf-8")
        temporary.rename(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"{file} cannot be written: {error.strerror or error}.") from None
    deadline = time.monotonic() + _TAKEN_S
    try:
        while file.exists():
            if not is_in_use(folder):
                raise UsageError(f"the run in {folder} has ended meanwhile: only a running run can be scaled.")
            if time.monotonic() > deadline:
                raise UsageError(f"the run in {folder} has no launcher: only a run of `roundtable local` can be scaled.")
            time.sleep(TICK_S)
    finally:
        file.unlink(missing_ok=True)
    return folder


def take(folder: Path) -> int | None:
    """Return the number of workers that was asked for since the last call. None if none was."""
    taken = folder / f"{SCALE_FILE}.tmp"
    try:
        (folder / SCALE_FILE).rename(taken)  # so that a request that comes just now is not lost
        count = int(taken.read_text(encoding="utf-8"))
        taken.unlink()
    except (OSError, ValueError):
        return None
    return count if count > 0 else None
