"""Ends a child process with its parent, even if the parent is killed with -9."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

#: Environment variable by which a process tells its children its process id.
PARENT_VARIABLE = "PS_PARENT_PID"

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the process `parent`, which started it, ends. Do nothing if this is not Linux.

    Raises SystemExit if the parent has ended already: it may have ended before the kernel was asked.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit("error: the process that started this one is gone.")
