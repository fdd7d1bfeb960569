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

#: Environment variable with the folder that workers write their steps to, as rank-N.jsonl.
STEPS_VARIABLE = "BENCHMARK_STEPS"
WORKERS = 2


class StepLog:
    """The steps of one worker as JSON lines: how many were done at which time of the monotonic clock, and at last the loss."""

    def __init__(self, rank: int) -> None:
        self._file = (Path(os.environ[STEPS_VARIABLE]) / f"rank-{rank}.jsonl").open("w", encoding="utf-8")
        self._done = 0

    def reached(self, done: int) -> None:
        """Note that `done` steps are over by now; nothing is noted twice."""
        if done > self._done:
            self._done = done
            self._file.write(json.dumps({"done": done, "at": time.monotonic()}) + "\n")

    def close(self, before: float, after: float) -> None:
        """Note the loss that training has begun with and what it has led to, and end the log."""
        self._file.write(json.dumps({"loss_before": before, "loss": after}) + "\n")
        self._file.close()


class Brake:
    """Makes the last worker slower: it sleeps after computing, for (factor - 1) times the processor time that took."""

    def __init__(self, rank: int, factor: float) -> None:
        self._factor = factor if rank == WORKERS - 1 else 1.0
        self._began = 0.0

    def begin(self) -> None:
        """Note that the computation of a step begins, on this thread."""
        self._began = time.thread_time()

    def end(self) -> None:
        """Note that it is over, and sleep."""
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
        """The loss of the last step's global batch with the weights that the model has now."""
        x, y = self.workload.dataset(WORKERS).tensors
        size = WORKERS * self.workload.batch
        at = (self.steps - 1) * size % len(x)
        with torch.no_grad():
            parts = zip(x[at : at + size].split(self.workload.batch), y[at : at + size].split(self.workload.batch), strict=True)
            return sum(float(self.workload.loss(model, px, py)) for px, py in parts) / WORKERS


def parse_task(*flags: str) -> Task:
    """The task on the command line; `flags` are the switches that this system has besides. Dies with who started this."""
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

    `update` makes a step of the gradients in the model and returns the model to go on with.
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
    """`train` with an optimizer over the model's parameters."""

    def update() -> nn.Module:
        optimizer.step()
        optimizer.zero_grad()
        return model

    train(task, model, update)
