"""torch's ZeroRedundancyOptimizer over DDP and gloo: each worker keeps and updates its part of the optimizer's state."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer

from benchmarks.compare.systems import Command, Job
from benchmarks.compare.systems.ddp import FLAGS as FLAGS
from benchmarks.compare.systems.ddp import gloo_commands, join_group, replicate
from benchmarks.compare.training import parse_task, train_with


def not_sparse(flags: Sequence[str]) -> str:
    return "it sends whole parameters after every step, and so the whole table."


def commands(job: Job) -> list[Command]:
    """One process for each worker."""
    return gloo_commands(job, __name__)


def main() -> None:
    """Be one of the workers."""
    task = parse_task(*FLAGS)
    join_group(task)
    model = replicate(task)
    train_with(task, model, ZeroRedundancyOptimizer(model.parameters(), task.workload.optimizer, **task.workload.hyper))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
