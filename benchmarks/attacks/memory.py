"""The memory that the processes of an attacked run use."""

from __future__ import annotations

import threading

import psutil  # type: ignore[import-untyped,unused-ignore]

from benchmarks.live import Cluster

#: Seconds between two looks at memory.
_LOOK_S = 0.05


class Memory:
    """Measures how much the memory of a run's processes grows, from its creation on."""

    def __init__(self, run: Cluster) -> None:
        self._over = threading.Event()
        self._grown = 0
        self._before = {pid: resident(pid) for pid in run.pids().values()}
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(_LOOK_S):
            for pid, size in self._before.items():
                self._grown = max(self._grown, resident(pid) - size)

    def grown(self) -> int:
        """Stop measuring. Return the most bytes by which any of them has grown."""
        self._over.set()
        self._thread.join()
        return self._grown


def resident(pid: int) -> int:
    """Return the resident bytes of a process, or 0 if it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0
