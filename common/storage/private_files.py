"""A run's files are for its user alone: who reads the address of a run can join it, and weights may have been made of secrets."""

from __future__ import annotations

import errno
import os
from pathlib import Path

#: The umask of this process before `keep_private`, for programs of the user's that it starts; -1 if it is that still.
usual_umask = -1


def keep_private() -> None:
    """Have the files that this process makes from now on be its user's alone."""
    global usual_umask
    usual_umask = os.umask(0o077)


def make_run_dir(folder: Path) -> None:
    """Make a run directory, if there is none, that is its user's alone. OSError where that cannot be."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder.parent)) from None
    folder.mkdir(mode=0o700, exist_ok=True)
