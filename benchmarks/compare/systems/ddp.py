"""torch's DistributedDataParallel over gloo: `--view` for gradient_as_bucket_view, `--fp16` for the fp16 compression hook."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.compare.systems import Command, Job, module_command
from benchmarks.compare.training import STEPS_VARIABLE, WORKERS, Task, parse_task, train_with

FLAGS: tuple[str, ...] = ("view", "fp16")


def not_sparse(flags: Sequence[str]) -> str:
    return "torch's fp16 hook takes no sparse gradients." if "--fp16" in flags else ""


def commands(job: Job) -> list[Command]:
    """One process for each worker."""
    return gloo_commands(job, __name__)


def gloo_commands(job: Job, module: str) -> list[Command]:
    """Return a command for each worker. It runs `module`, and its process finds the others by `join_group`."""
    return [
        Command(
            f"worker-{rank}",
            rank,
            module_command(module, "--rank", str(rank), *job.worker_arguments(), *job.flags),
            {"GLOO_SOCKET_IFNAME": job.hosts[rank].interface},
        )
        for rank in range(WORKERS)
    ]


def join_group(task: Task) -> None:
    """Join the gloo group. Its processes find each other by a file, and talk over the network."""
    meeting = Path(os.environ[STEPS_VARIABLE]).resolve() / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=task.rank, world_size=WORKERS)


def replicate(task: Task) -> DistributedDataParallel:
    """Return the task's model as DDP's replica."""
    model = DistributedDataParallel(task.workload.model(), gradient_as_bucket_view="view" in task.flags)
    if "fp16" in task.flags:
        model.register_comm_hook(None, fp16_compress_hook)
    return model


def main() -> None:
    """Be one of the workers."""
    task = parse_task(*FLAGS)
    join_group(task)
    model = replicate(task)
    train_with(task, model, task.workload.optimizer(model.parameters(), **task.workload.hyper))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
