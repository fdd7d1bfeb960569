"""This project. Flags are settings of the run, such as `--policy async --servers 1`, and beat the benchmark's own."""

from __future__ import annotations

import itertools
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
    """The launcher on this machine; over a network, what it would start, the servers dealt out to the workers' hosts."""
    whole = WORKERS * job.workload.batch
    micro = whole // _UNEVEN_MICRO_BATCHES if job.slow > 1.0 else job.workload.batch
    settings = ["--workers", str(WORKERS), "--threads", "1", "--rounds", str(job.steps)]
    lane = ["--lane", "socket"] if job.networked else []  # hosts that are one machine do share its memory
    settings += ["--global-batch", str(whole), "--micro-batch", str(micro), *lane, *job.flags]
    run = ["--run-dir", str(job.folder / "run")]
    script = [_SCRIPT, "--", *job.worker_arguments()]
    if not job.networked:
        return [Command("launcher", 0, [*_LAUNCH, "local", *settings, *run, *script])]
    address = f"tcp://{job.hosts[0].address}:{_PORT}"
    coordinator = Command("coordinator", 0, [*_LAUNCH, "coordinator", "--bind", address, *settings, *run])
    servers = [
        Command(f"server-{n}", n % WORKERS, [*_LAUNCH, "server", "--coordinator", address, "--index", str(n)])
        for n in range(_servers(settings))
    ]
    workers = [
        Command(f"worker-{n}", n, [*_LAUNCH, "worker", "--coordinator", address, "--index", str(n), *script])
        for n in range(WORKERS)
    ]
    return [coordinator, *servers, *workers]


def _servers(settings: list[str]) -> int:
    """How many servers these flags ask for; by default one on each host."""
    given = [b for a, b in itertools.pairwise(settings) if a == "--servers"]
    given += [flag.partition("=")[2] for flag in settings if flag.startswith("--servers=")]
    return int(given[-1]) if given else WORKERS
