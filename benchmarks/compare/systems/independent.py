"""Two processes that train on their own parts of the data and never talk. The excess of other systems is their communication."""

from __future__ import annotations

from benchmarks.compare.systems import Command, Job, module_command
from benchmarks.compare.training import WORKERS, parse_task, train_with

FLAGS: tuple[str, ...] = ()


def commands(job: Job) -> list[Command]:
    """One process for each worker."""
    return [
        Command(f"worker-{rank}", rank, module_command(__name__, "--rank", str(rank), *job.worker_arguments(), *job.flags))
        for rank in range(WORKERS)
    ]


def main() -> None:
    """Be one of the workers."""
    task = parse_task(*FLAGS)
    model = task.workload.model()
    train_with(task, model, task.workload.optimizer(model.parameters(), **task.workload.hyper))


if __name__ == "__main__":
    main()
