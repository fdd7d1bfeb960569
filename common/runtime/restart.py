"""Restart a process from inside: the same command, and nothing of its state."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

#: The signal that tells a worker to leave the run after its micro-batch; others do the rest.
LEAVE_SIGNAL = signal.SIGUSR1
#: Set if the starter of this process starts it again at once after the exit code AGAIN, which is quicker there.
AGAIN_VARIABLE = "PS_AGAIN"
AGAIN = 79


def restart(options: Sequence[str] | None = None) -> NoReturn:
    """Replace this process by a new one of the same command line, with `options` in place of its own, if given.

    The process id stays, unless the starter starts it again (AGAIN_VARIABLE). May be called on any thread. Child processes are
    killed: the new process starts its own.
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
    """Return the processes whose parent is this one; none if the system does not say."""
    found: list[int] = []
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, task.read_text().split())
    return found
