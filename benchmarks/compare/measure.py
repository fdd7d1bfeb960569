"""Run one job: start its processes, watch their processor time and memory, and read the steps that they log."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import psutil  # type: ignore[import-untyped,unused-ignore]

from benchmarks import ROOT
from benchmarks.compare.systems import Command, Job, Wire
from benchmarks.compare.training import STEPS_VARIABLE, WORKERS
from roundtable.cluster.process.children import GATHER_S, TICK_S, Processes, root_cause
from roundtable.cluster.process.signals import StopSignals
from roundtable.common.runtime.errors import ClusterError

#: Seconds between two samples of the processes' usage.
_LOOK_EVERY_S = 0.2
#: Proportional set sizes take long to count, on a processor that the measured processes need. They are counted when the resident
#: sizes, which are cheap, have grown by this factor since the last count.
_GROWTH = 1.02


class Measurement(msgspec.Struct, frozen=True):
    """The measurement of one run of one system."""

    #: Seconds of each timed step, on worker 0.
    step_s: list[float]
    #: Processor seconds, user and system, of all processes in the timed steps, by step.
    cpu_s: float
    #: Largest sum of the processes' proportional set sizes, from start to end.
    memory_mb: float
    #: The loss of the last global batch after the last step, with each worker's weights.
    losses: list[float]
    #: The loss of that batch before the first step.
    loss_before: float
    #: The number of processors that other processes used in the timed steps. Above a tenth or so, times are disturbed.
    others: float
    wire: Wire | None = None

    @property
    def step_ms(self) -> float:
        """Return the milliseconds of the mean step. The mean, because some systems wait or merge in few steps only."""
        return statistics.fmean(self.step_s) * 1000.0

    @property
    def loss(self) -> float:
        """Return the mean of `losses`."""
        return statistics.fmean(self.losses)


class Usage:
    """Samples of the processor time and memory of a process tree."""

    def __init__(self) -> None:
        self._cpu: dict[tuple[int, float], float] = {}
        #: (time, processor seconds of the tree until then, and of the whole machine)
        self.samples: list[tuple[float, float, float]] = []
        self.memory = 0
        self._resident = 0
        self._looked_at = float("-inf")

    def look(self, roots: Sequence[int]) -> None:
        """Take the samples that are due."""
        now = time.monotonic()
        if now < self._looked_at + _LOOK_EVERY_S:
            return
        self._looked_at = now
        tree = []
        for pid in roots:
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(pid)
                tree += [root, *root.children(recursive=True)]
        resident = 0
        for process in tree:
            with contextlib.suppress(psutil.Error):
                used = process.cpu_times()
                self._cpu[process.pid, process.create_time()] = used.user + used.system
                resident += process.memory_info().rss
        whole = psutil.cpu_times()
        busy = whole.user + whole.nice + whole.system + whole.irq + whole.softirq
        self.samples.append((now, sum(self._cpu.values()), busy))
        if resident > _GROWTH * self._resident:
            self._resident = resident
            self.memory = max(self.memory, sum(map(_proportional, tree)))

    def between(self, start: float, end: float) -> tuple[float, float]:
        """Return the processor seconds of the tree, and of the whole machine, between two times."""
        at, tree, whole = zip(*self.samples, strict=True)
        return tuple(float(np.interp(end, at, used) - np.interp(start, at, used)) for used in (tree, whole))  # type: ignore[return-value]


def run(commands: Sequence[Command], job: Job, signals: StopSignals, warmup: int, timeout: float) -> Measurement:
    """Run a job's processes to their end and return the measurement of the steps after `warmup`. No process is left at the end.

    Raise ClusterError, which names the process and its log, if a process fails or the time is over. Raise KeyboardInterrupt on a
    signal.
    """
    steps = job.folder / "steps"
    steps.mkdir(parents=True)
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        STEPS_VARIABLE: str(steps.resolve()),
    }
    usage = Usage()
    with Processes(job.folder / "logs", env) as processes:
        for command in commands:
            processes.start(command.name, [*job.hosts[command.host].prefix, *command.argv], **command.env)
        watch(processes, signals, timeout, lambda: usage.look([child.popen.pid for child in processes.running()]))
    return _evaluate(steps, usage, job.steps, warmup)


def watch(processes: Processes, signals: StopSignals, timeout: float, look: Callable[[], object] | None = None) -> None:
    """Wait until all processes have ended well, and call `look` meanwhile. Raise as `run` does."""
    deadline = time.monotonic() + timeout
    failed_at = float("inf")
    while processes.running():
        time.sleep(TICK_S)
        if look is not None:
            look()
        processes.poll()
        if signals.first:
            raise KeyboardInterrupt
        if processes.failures():
            failed_at = min(failed_at, time.monotonic())
        if time.monotonic() > failed_at + GATHER_S:
            break
        if time.monotonic() > deadline:
            late = processes.running()[0]
            raise ClusterError(f"{late.name} has not ended after {timeout:.0f} s; its log is {late.log}.")
    if processes.failures():
        raise ClusterError(root_cause(processes.failures()).describe_end())


def _proportional(process: psutil.Process) -> int:
    """Return a process's proportional set size, in bytes, or 0 if it has ended."""
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


def _evaluate(steps: Path, usage: Usage, count: int, warmup: int) -> Measurement:
    losses, before, step_s, start, end = [], 0.0, [], 0.0, 0.0
    for rank in range(WORKERS):
        path = steps / f"rank-{rank}.jsonl"
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        if not lines or "loss" not in lines[-1]:
            raise ClusterError(f"worker {rank} ended without logging its loss; {path} is not whole.")
        losses.append(float(lines[-1]["loss"]))
        if rank == 0:
            before = float(lines[-1]["loss_before"])
            marks = [(line["done"], line["at"]) for line in lines[:-1] if line["done"] >= warmup]
            if marks[-1][0] != count:
                raise ClusterError(f"worker 0 logged {marks[-1][0]} steps, not {count}.")
            step_s = step_durations(marks)
            start, end = marks[0][1], marks[-1][1]
    cpu, whole = usage.between(start, end)
    others = max(0.0, whole - cpu) / (end - start)
    return Measurement(step_s, cpu / len(step_s), usage.memory / 1e6, losses, before, others)


def step_durations(marks: Sequence[tuple[int, float]]) -> list[float]:
    """Return how long each step took, from (steps done, time) in order. Steps that ended at one time share the time equally."""
    out: list[float] = []
    for (done, at), (next_done, next_at) in itertools.pairwise(marks):
        out += [(next_at - at) / (next_done - done)] * (next_done - done)
    return out
