"""A harm that moves the wall clock."""

from __future__ import annotations

import os
import time
from pathlib import Path

from benchmarks.faults.harms.base import Harm
from benchmarks.faults.harms.processes import coordinator_killed
from benchmarks.live import Cluster

#: Once a certain file exists, time.time() is off by so many seconds in a process that imports this.
_CLOCK = """import os, time
real = time.time
time.time = lambda: real() + ({seconds} if os.path.exists({flag!r}) else 0)
"""


def clock(folder: Path, seconds: float) -> tuple[Harm, dict[str, str]]:
    """Return a harm that moves the wall clock of all processes, and the environment that lets it.

    `folder` gets a module that Python imports at its start.
    """
    folder.mkdir(parents=True)
    flag = folder / "moved"
    (folder / "sitecustomize.py").write_text(_CLOCK.format(seconds=seconds, flag=str(flag)), encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))

    def harm(run: Cluster) -> Cluster:
        flag.touch()
        time.sleep(1.0)
        return coordinator_killed(run)  # the new coordinator reads times of the other clock

    return harm, {"PYTHONPATH": path}
