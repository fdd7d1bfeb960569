"""A process that was started by another one here ends with it, even if that one is killed with -9."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

#: Environment variable in which a process tells those it starts who their parent is.
PARENT_VARIABLE = "PS_PARENT_PID"

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the process `parent`, which started it, ends. Linux only; elsewhere nothing.

    Raises SystemExit where the parent is gone already: it may have ended before the kernel was asked.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit("error: the process that started this one is gone.")
