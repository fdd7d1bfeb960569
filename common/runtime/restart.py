"""Beginning a process anew, from inside it: the same command, with nothing of what it was."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

#: Tells a worker to leave the run after the micro-batch it is at; others do the rest.
LEAVE_SIGNAL = signal.SIGUSR1
#: Set where whoever started this process starts it again at once when it ends with the exit code AGAIN, which is quicker there.
AGAIN_VARIABLE = "PS_AGAIN"
AGAIN = 79


def restart(options: Sequence[str] | None = None) -> NoReturn:
    """Replace this process by a new one of the same command line, with `options` in place of its own, if given: under the same
    process id, unless it is started again (AGAIN_VARIABLE) by who knows of these.

    May be called on any thread. Processes that this one has started are killed: whoever is begun anew starts its own.
    """
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    for child in _children():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(child, signal.SIGKILL)
    if AGAIN_VARIABLE in os.environ:
        os._exit(AGAIN)
    own = len(sys.argv) - 2 if options is not None else 0  # the first of our arguments names the command
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - own], *(options or ())])


def _children() -> list[int]:
    """Processes whose parent is this one; none where the system does not tell."""
    found: list[int] = []
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, task.read_text().split())
    return found
