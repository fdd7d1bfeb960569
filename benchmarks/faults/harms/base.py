"""The type of a harm, and slowing processes down.

A harm takes a running run, and returns the run to look at afterwards.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence

from benchmarks.live import Cluster

Harm = Callable[[Cluster], Cluster]

#: The most seconds of a harm that goes on until the run ends.
LIMIT_S = 90.0
#: Seconds for which a slow process runs at a time: less than a micro-batch takes, or it would seem as fast as others.
_SLICE_S = 0.001


def slow_down(run: Cluster, pids: Sequence[int], factor: int, seconds: float) -> None:
    """Let these processes run for 1/factor of the time only, for some seconds or until the run ends."""

    def tell(number: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    end = time.monotonic() + seconds
    try:
        while run.is_running and time.monotonic() < end:
            tell(signal.SIGSTOP)
            time.sleep(_SLICE_S * (factor - 1))
            tell(signal.SIGCONT)
            time.sleep(_SLICE_S)
    finally:
        tell(signal.SIGCONT)
