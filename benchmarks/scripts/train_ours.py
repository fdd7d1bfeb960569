"""The script that this project's workers run in the benchmarks: a user's script that also logs when rounds are over."""

from __future__ import annotations

import roundtable
from benchmarks.compare.training import WORKERS, Brake, StepLog, parse_task
from benchmarks.compare.workloads import BATCHES


def main() -> None:
    """Train for the rounds of the run's settings. A step is a round."""
    task = parse_task()
    run = roundtable.join()
    model = run.replicate(task.workload.model())
    opt = run.optimizer(task.workload.optimizer, **task.workload.hyper)
    log, brake, before = StepLog(run.index), Brake(run.index, task.slow), task.loss(model)
    epochs = -(-task.steps // BATCHES)
    for x, y in run.batches(task.workload.dataset(WORKERS), epochs=epochs, shuffle=False):
        log.reached(run.round)
        brake.begin()
        task.workload.loss(model, x, y).backward()  # type: ignore[no-untyped-call,unused-ignore]
        brake.end()
        opt.step()
        log.reached(run.round)
    log.reached(run.round)
    log.close(before, task.loss(model))


if __name__ == "__main__":
    main()
