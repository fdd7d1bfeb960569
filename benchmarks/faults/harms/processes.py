"""Harms to single processes: they are killed, stopped or slowed down."""

from __future__ import annotations

import contextlib
import os
import signal
import time

from benchmarks.faults.harms.base import LIMIT_S, Harm, slow_down
from benchmarks.live import ByHand, Cluster
from roundtable.common.runtime.failpoints import MARK


def nothing(run: Cluster) -> Cluster:
    return run


def kill_with_model(*names: str) -> Harm:
    """Kill with -9 once the trained model is written."""

    def harm(run: Cluster) -> Cluster:
        run.until(lambda: run.events("model"), "the model was written")
        for name in names:
            run.signal(name)
        return run

    return harm


def failpoints(count: int) -> Harm:
    """Wait until so many processes have failed at their failpoints."""

    def harm(run: Cluster) -> Cluster:
        run.until(lambda: len(list(run.folder.glob(f"{MARK}*"))) >= count, f"{count} failpoints were reached")
        return run

    return harm


def failpoint_then_wake(seconds: float, name: str) -> Harm:
    """Wait until a process has stopped at its failpoint, and wake it after so long."""

    def harm(run: Cluster) -> Cluster:
        pid = run.pids()[name]
        failpoints(1)(run)
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        return run

    return harm


def kill(*names: str) -> Harm:
    """Kill these processes with -9, all at once."""

    def harm(run: Cluster) -> Cluster:
        for name in names:
            run.signal(name)
        return run

    return harm


def stop(name: str, seconds: float) -> Harm:
    """Stop processes with SIGSTOP, and wake them with SIGCONT after some seconds."""

    def harm(run: Cluster) -> Cluster:
        pid = run.pids()[name]
        run.signal(name, signal.SIGSTOP)
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        return run

    return harm


def slow(name: str, factor: int) -> Harm:
    """Let a process run for 1/factor of the time only, until the run ends."""

    def harm(run: Cluster) -> Cluster:
        slow_down(run, [run.pids()[name]], factor, LIMIT_S)
        return run

    return harm


def coordinator_killed(run: Cluster) -> Cluster:
    """Kill the coordinator with -9. If it was started by hand, start another one."""
    run.signal("coordinator")
    if isinstance(run, ByHand):
        run.recover()
    return run
