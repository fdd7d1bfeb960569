"""Keep a run's files for its user alone: a reader of a run's address can join it, and weights may be made of secrets."""

from __future__ import annotations

import errno
import os
from pathlib import Path

#: The umask before `keep_private`, for the user's programs that this process starts; -1 before that call.
usual_umask = -1


def keep_private() -> None:
    """Make new files of this process readable by its user alone."""
    global usual_umask
    usual_umask = os.umask(0o077)


def make_run_dir(folder: Path) -> None:
    """Make a run directory for its user alone, if there is none. Raise OSError if that fails."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder.parent)) from None
    folder.mkdir(mode=0o700, exist_ok=True)
