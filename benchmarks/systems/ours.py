"""This project. Flags are settings of the run, such as `--policy async --servers 1`, and beat the benchmark's own."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.systems import ROOT, Command, Job
from benchmarks.training import WORKERS

FLAGS = None
#: Micro-batches per round where a worker is slowed down: what is leased must be finer than a worker's share.
_UNEVEN_MICRO_BATCHES = 8
_PORT = 5555
_LAUNCH = [sys.executable, str(ROOT / "launch.py")]
_SCRIPT = str(Path(__file__).parents[1] / "train_ours.py")


def commands(job: Job) -> list[Command]:
    """The launcher on this machine; over a network, a coordinator and on each host a worker with a server beside it."""
    whole = WORKERS * job.workload.batch
    micro = whole // _UNEVEN_MICRO_BATCHES if job.slow > 1.0 else job.workload.batch
    settings = ["--workers", str(WORKERS), "--threads", "1", "--rounds", str(job.steps)]
    settings += ["--global-batch", str(whole), "--micro-batch", str(micro), *job.flags]
    run = ["--run-dir", str(job.folder / "run")]
    script = [_SCRIPT, "--", *job.worker_arguments()]
    if not job.networked:
        return [Command("launcher", 0, [*_LAUNCH, "local", *settings, *run, *script])]
    address = f"tcp://{job.hosts[0].address}:{_PORT}"
    coordinator = [*_LAUNCH, "coordinator", "--bind", address, "--servers", str(WORKERS), *settings, *run]
    worker = [*_LAUNCH, "worker", "--coordinator", address, "--colocate"]
    workers = [Command(f"worker-{n}", n, [*worker, "--index", str(n), *script]) for n in range(WORKERS)]
    return [Command("coordinator", 0, coordinator), *workers]
