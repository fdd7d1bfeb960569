"""This project. Flags are settings of the run, such as `--policy async --servers 1`, and beat the benchmark's own.

Variants name transports, policies and codecs. `ours:socket,ssp,bf16` sends tensors through sockets, gradients and weights in
bfloat16 (`topk`: gradients only). `ours:int8/onebit` pushes in int8 and sends weights in one bit.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from benchmarks import LAUNCH, SCRIPTS
from benchmarks.compare.systems import Command, Job, Wire
from benchmarks.compare.training import WORKERS
from roundtable.cluster.run.run_directory import read_summary
from roundtable.common.config.settings import PolicyName, PushCodec, WeightCodec

FLAGS = None


def _codecs(push: str, weight: str) -> tuple[str, ...]:
    return "--compress-gradients", push, "--compress-weights", weight


VARIANTS: Mapping[str, Sequence[str]] = {
    "memory": ("--transport", "auto"),
    "socket": ("--transport", "tcp"),
    **{policy: ("--policy", policy) for policy in get_args(PolicyName)},
    **{push: _codecs(push, push if push in get_args(WeightCodec) else "none") for push in get_args(PushCodec) if push != "none"},
    **{f"{push}/{weight}": _codecs(push, weight) for push in get_args(PushCodec) for weight in get_args(WeightCodec)},
}
#: Micro-batches per round if a worker is slowed down: reassigned work must be finer than a worker's share.
_UNEVEN_MICRO_BATCHES = 8
_PORT = 5555
_LAUNCH = [sys.executable, str(LAUNCH)]
_SCRIPT = str(SCRIPTS / "train_ours.py")


def not_sparse(flags: Sequence[str]) -> str:
    apart = {"local", "average"} & {word for flag in flags for word in flag.split("=")}
    return f"under {apart.pop()} each worker has all parameters, and so the whole table." if apart else ""


def commands(job: Job) -> list[Command]:
    """Return the launcher's command on this machine. Over a network: a coordinator, and on each host a worker with a server."""
    whole = WORKERS * job.workload.batch
    micro = whole // _UNEVEN_MICRO_BATCHES if job.slow > 1.0 else job.workload.batch
    settings = ["--workers", str(WORKERS), "--threads", "1", "--rounds", str(job.steps)]
    settings += ["--global-batch", str(whole), "--micro-batch", str(micro)]
    settings += ["--checkpoint-every", "0", *job.flags]  # the other systems make no checkpoints
    run = ["--run-dir", str(_run_dir(job))]
    script = [_SCRIPT, "--", *job.worker_arguments()]
    if not job.networked:
        return [Command("launcher", 0, [*_LAUNCH, "local", *settings, *run, *script])]
    address = f"tcp://{job.hosts[0].address}:{_PORT}"
    coordinator = [*_LAUNCH, "coordinator", "--listen", address, "--servers", str(WORKERS), *settings, *run]
    worker = [*_LAUNCH, "worker", "--coordinator", address, "--colocate"]
    workers = [Command(f"worker-{n}", n, [*worker, "--index", str(n), *script]) for n in range(WORKERS)]
    return [Command("coordinator", 0, coordinator), *workers]


def wire(job: Job) -> Wire:
    """Return the traffic in the run's summary, over all steps, the first weights included."""
    told = (read_summary(_run_dir(job)) or {})["wire"]
    megabytes = (told["pushed_bytes"] + told["pulled_bytes"]) / 1e6
    return Wire(megabytes / job.steps, told["encode_seconds"] / job.steps, told["decode_seconds"] / job.steps)


def _run_dir(job: Job) -> Path:
    return job.folder / "run"
