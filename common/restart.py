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
AGAIN = 75


def restart(extra: Sequence[str] = (), without: str = "") -> NoReturn:
    """Replace this process by a new one of the same command line, with the arguments `extra` that it has not yet, less one: under
    the same process id, unless it is started again (AGAIN_VARIABLE) by who knows of these.

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
    command = [sys.executable, *(argument for argument in sys.orig_argv[1:] if argument != without)]
    os.execv(sys.executable, [*command, *(argument for argument in extra if argument not in command)])


def _children() -> list[int]:
    """Processes whose parent is this one; none where the system does not tell."""
    found: list[int] = []
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, task.read_text().split())
    return found
