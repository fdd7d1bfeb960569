"""Ends all processes that a launcher's children have started, even if the launcher itself was killed.

Run as a script, this file is the guard, a process of its own. It reads the numbers of the launcher's process groups, one a line,
until its input ends. The input ends only if the launcher is gone and has not stopped the guard, as after kill -9.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Collection
from pathlib import Path

#: Environment variable with a value that all descendants of a launcher share, and no other process has.
FAMILY_VARIABLE = "PS_FAMILY"

_PROC = Path("/proc")
_SHARED_MEMORY = Path("/dev/shm")
_TORCH_FILE = re.compile(r"torch_(\d+)_")
_LIMIT_S = 10.0
_TICK_S = 0.02


def relatives(groups: Collection[int], family: str) -> set[int]:
    """Return the living processes that are in one of these process groups or were started with this value of FAMILY_VARIABLE.

    The group finds processes that have written over their environment. The environment finds processes that have left the group.
    """
    found = set()
    entry = f"{FAMILY_VARIABLE}={family}".encode()
    for path in _PROC.iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):  # the process has just ended, or is another user's
                pid = int(path.name)
                if os.getpgid(pid) in groups or entry in (path / "environ").read_bytes().split(b"\0"):
                    state = (path / "stat").read_bytes().rpartition(b")")[2].split()[0]
                    if state not in (b"Z", b"X"):
                        found.add(pid)
    return found


def remove_shared_memory(pids: Collection[int]) -> None:
    """Remove the shared memory of torch's tensors that killed processes have not unlinked."""
    with contextlib.suppress(OSError):
        for path in _SHARED_MEMORY.iterdir():
            made = _TORCH_FILE.match(path.name)
            if made and int(made[1]) in pids:
                path.unlink(missing_ok=True)


def main() -> None:
    """Wait until the input ends, then kill until no process is left."""
    groups = {int(line) for line in sys.stdin}
    seen = set(groups)
    deadline = time.monotonic() + _LIMIT_S
    while (left := relatives(groups, sys.argv[1])) and time.monotonic() < deadline:
        seen |= left
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_TICK_S)
    remove_shared_memory(seen)


if __name__ == "__main__":
    main()
