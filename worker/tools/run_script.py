"""Running a training script as a worker of a cluster."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.joining import ADDRESS_VARIABLE, INDEX_VARIABLE


def run_script(coordinator: str, script: str | None, args: list[str], index: int | None) -> None:
    """Run `script` with `args` as `python script args` would, as a worker of `coordinator`. None is the built-in example.

    An exception of the script is raised here, after the coordinator was told. Raises UsageError if the file does not exist.
    """
    path = Path(script) if script is not None else Path(__file__).with_name("builtin_script.py")
    if not path.is_file():
        raise UsageError(f"there is no script {path}.")
    os.environ[ADDRESS_VARIABLE] = coordinator
    if index is not None:
        os.environ[INDEX_VARIABLE] = str(index)
    sys.argv = [str(path), *args]
    sys.path.insert(0, str(path.resolve().parent if script is not None else Path.cwd()))
    runpy.run_path(str(path), run_name="__main__")
