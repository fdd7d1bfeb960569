"""The common part of all systems' worker scripts: their arguments, the loop, and the log of steps."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.compare.workloads import WORKLOADS, Workload
from roundtable.cluster.process.parent_death import PARENT_VARIABLE, die_with_parent

#: Environment variable with the folder to which workers write their steps, as rank-N.jsonl.
STEPS_VARIABLE = "BENCHMARK_STEPS"
WORKERS = 2


class StepLog:
    """The steps of one worker as JSON lines: steps done and the time on the monotonic clock. The last line has the loss."""

    def __init__(self, rank: int) -> None:
        self._file = (Path(os.environ[STEPS_VARIABLE]) / f"rank-{rank}.jsonl").open("w", encoding="utf-8")
        self._done = 0

    def reached(self, done: int) -> None:
        """Note that `done` steps are over, unless that was noted before."""
        if done > self._done:
            self._done = done
            self._file.write(json.dumps({"done": done, "at": time.monotonic()}) + "\n")

    def close(self, before: float, after: float) -> None:
        """Note the loss before and after training, and end the log."""
        self._file.write(json.dumps({"loss_before": before, "loss": after}) + "\n")
        self._file.close()


class Brake:
    """Makes the last worker slower: after computing it sleeps for (factor - 1) times the processor time of the computation."""

    def __init__(self, rank: int, factor: float) -> None:
        self._factor = factor if rank == WORKERS - 1 else 1.0
        self._began = 0.0

    def begin(self) -> None:
        """Note that the computation of a step begins, on this thread."""
        self._began = time.thread_time()

    def end(self) -> None:
        """Note that the computation is over, and sleep."""
        if self._factor > 1.0:
            time.sleep((self._factor - 1.0) * (time.thread_time() - self._began))


@dataclass(frozen=True)
class Task:
    """The job of a worker script. `steps` includes the warm-up."""

    workload: Workload
    rank: int
    steps: int
    slow: float
    flags: frozenset[str]

    def loss(self, model: nn.Module) -> float:
        """Return the loss of the last step's global batch with the present weights of the model."""
        x, y = self.workload.dataset(WORKERS).tensors
        size = WORKERS * self.workload.batch
        at = (self.steps - 1) * size % len(x)
        with torch.no_grad():
            parts = zip(x[at : at + size].split(self.workload.batch), y[at : at + size].split(self.workload.batch), strict=True)
            return sum(float(self.workload.loss(model, px, py)) for px, py in parts) / WORKERS


def parse_task(*flags: str) -> Task:
    """Return the task on the command line, and let this process die with its parent. `flags` are the system's own switches."""
    if parent := os.environ.pop(PARENT_VARIABLE, None):
        die_with_parent(int(parent))
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=WORKLOADS, required=True)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--slow", type=float, default=1.0)
    for flag in flags:
        parser.add_argument(f"--{flag}", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = frozenset(flag for flag in flags if getattr(args, flag))
    return Task(WORKLOADS[args.model], args.rank, args.steps, args.slow, chosen)


def train(task: Task, model: nn.Module, update: Callable[[], nn.Module], rank: int | None = None) -> None:
    """Train for the task's steps on this worker's part of each global batch, and log them.

    `update` makes a step of the gradients in the model, and returns the model for the next step.
    """
    rank = task.rank if rank is None else rank
    x, y = task.workload.dataset(WORKERS).tensors
    parts = list(zip(x.split(task.workload.batch), y.split(task.workload.batch), strict=True))[rank::WORKERS]
    log, brake, before = StepLog(rank), Brake(rank, task.slow), task.loss(model)
    for step in range(task.steps):
        brake.begin()
        task.workload.loss(model, *parts[step % len(parts)]).backward()  # type: ignore[no-untyped-call,unused-ignore]
        brake.end()
        model = update()
        log.reached(step + 1)
    log.close(before, task.loss(model))


def train_with(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Call `train` with an optimizer over the model's parameters."""

    def update() -> nn.Module:
        optimizer.step()
        optimizer.zero_grad()
        return model

    train(task, model, update)
