"""A run directory: the names of its files, and how the directory that a user names is found."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Literal

from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage.event_log import FILE_NAME

SETTINGS_FILE = "settings.toml"
SUMMARY_FILE = "summary.json"
MODEL_FILE = "model.safetensors"
#: The folder of the models that a script has saved by `run.save`.
SAVED_MODELS = "models"
RUNS = Path("runs")

#: The start of a coordinator in a run directory. It begins a run, or takes the place of a dead coordinator whose servers and
#: workers wait, or resumes from the newest checkpoint, or only tells late workers that the run has finished.
How = Literal["begin", "recover", "resume", "nothing"]

#: The first line of a run's settings file.
SETTINGS_HEADER = "# The settings of this run; give this file to --config to repeat it.\n"


def is_run(folder: Path) -> bool:
    """Return True if a run, finished or not, has written to `folder`."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if (folder / FILE_NAME).read_bytes()[:15] == b"SQLite format 3":
            return True
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (folder / SETTINGS_FILE).read_text(encoding="utf-8").startswith(SETTINGS_HEADER)
    return False


def find_run(name: str) -> Path:
    """Return the folder of the run `name`: a run directory, or a name under runs/. Raise UsageError if there is none."""
    for folder in (Path(name), RUNS / name):
        if folder.is_dir() and is_run(folder):
            return folder
    there = sorted(path.name for path in RUNS.glob("*") if is_run(path))
    known = f"{RUNS}/ has {', '.join(there)}" if there else f"{RUNS}/ has none"
    raise UsageError(f"run '{name}' not found: give a run directory, or the name of one under {RUNS}/; {known}.")
