"""The command line of the benchmarks: `python -m benchmarks --help`."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec
import torch

from benchmarks import network
from benchmarks.compare import measure
from benchmarks.compare.report import Result, Results, read_results, to_markdown, write_report, write_results
from benchmarks.compare.systems import Entry, Job, names, parse_entry
from benchmarks.compare.training import WORKERS
from benchmarks.compare.workloads import WORKLOADS
from roundtable.cluster.process.signals import StopSignals
from roundtable.cluster.run.exit_codes import run_command
from roundtable.common.runtime.errors import ClusterError, UsageError

#: The systems that are compared by default.
SYSTEMS = ("independent", "ddp", "rpc", "ours", "ours:socket")
#: The systems that --all adds, besides our codecs.
_ALL = (
    "independent", "ddp", "ddp:view", "ddp:fp16", "zero", "rpc", "ours", "ours:socket",
    "ours:backup", "ours:ssp", "ours:async", "ours:local", "ours:average",
)  # fmt: skip
_CODECS = ("bf16", "fp16", "int8", "onebit", "topk", "int8/onebit")
NETWORKS = (network.LOOPBACK, *network.RATES)
_QUICK = {"steps": 3, "warmup": 1, "repeats": 1}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--model", "models", multiple=True, type=click.Choice(list(WORKLOADS)), help="Model to train (default: all).")
@click.option("--system", "systems", multiple=True, metavar="'[NAME=]SYSTEM[:VARIANT,...] [FLAGS]'",
              help="System that trains it: ddp:view, ours:socket,ssp, ours:int8/onebit (pushes and weights), 'one=ours --servers "
              f"1'. FLAGS of ours are its settings. Systems: {', '.join(names())} (default: {' '.join(SYSTEMS)}).")  # fmt: skip
@click.option("--all", "everything", is_flag=True,
              help="All systems, their variants, our transports, codecs and policies, on all networks, unless --system or "
              "--network are given too. That takes many hours.")  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True, help="Timed steps.")
@click.option("--warmup", type=click.IntRange(min=1), default=5, show_default=True, help="Steps before the timed ones.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True,
              help="Runs of each system, in fresh processes; the systems take turns.")  # fmt: skip
@click.option("--quick", is_flag=True, help="A few steps only, to see whether it works.")
@click.option("--network", "networks", multiple=True, type=click.Choice(NETWORKS),
              help="Network between the workers (repeatable). A rate makes network namespaces, as root (default: "
              f"{network.LOOPBACK}).")  # fmt: skip
@click.option("--slow-worker", type=click.FloatRange(min=1.0), default=1.0, metavar="FACTOR",
              help="Have the last worker compute this many times slower; ours then has 8 micro-batches a round.")  # fmt: skip
@click.option("--timeout", type=click.FloatRange(min=1.0), default=600.0, show_default=True, help="Seconds for one run.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/benchmarks"), show_default=True,
              help="Folder for results and logs. The results of an earlier benchmark are replaced.")  # fmt: skip
@click.option("--report-only", is_flag=True, help="Make table and plot again from the results in --out.")
@click.pass_context
def cli(
    ctx: click.Context,
    models: Sequence[str],
    systems: Sequence[str],
    everything: bool,
    steps: int,
    warmup: int,
    repeats: int,
    quick: bool,
    networks: Sequence[str],
    slow_worker: float,
    timeout: float,
    out: Path,
    report_only: bool,
) -> None:
    """Train the same models with several systems in turn, and compare time, processor time, memory, traffic and loss.

    Two workers with a torch thread each train from the same weights on the same batches. Results are written to --out as a
    table (results.md), a plot (results.png) and JSON (results.json).
    """
    if report_only:
        _report(read_results(out), out)
        return
    if quick:
        steps, warmup, repeats = (_QUICK[k] if _is_default(ctx, k) else ctx.params[k] for k in ("steps", "warmup", "repeats"))
    chosen = {
        name: _entries(systems or (_all(name) if everything else SYSTEMS))
        for name in networks or (NETWORKS if everything else (network.LOOPBACK,))
    }
    about = {
        "run": f"{WORKERS} workers, 1 torch thread each; {warmup} + {steps} steps, {repeats} repeats",
        "machine": f"{os.cpu_count()} processors, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}",
    }
    if slow_worker > 1:
        about["slow worker"] = f"worker {WORKERS - 1} sleeps for {slow_worker - 1:g} times the time that it computes"
    named = [e for entries in chosen.values() for e in entries if e.name.split()[0] != e.system]
    about |= {f"`{e.name}`": " ".join((e.system, *e.flags)) for e in named}
    for name in chosen:
        with network.hosts(name):
            pass  # find a missing permission now, not after hours
    _prepare(out)
    results = Results(about, [])
    with StopSignals() as signals:
        for name, entries in chosen.items():
            with network.hosts(name) as hosts:
                for model in models or WORKLOADS:
                    for repeat, (number, entry) in itertools.product(range(repeats), enumerate(entries)):
                        folder = out / "jobs" / f"{name}-{model}-{repeat}-{number}-{entry.system}"
                        job = Job(WORKLOADS[model], warmup + steps, slow_worker, hosts, folder, entry.flags)
                        results.runs.append(_run(name, entry, job, repeat, signals, warmup, timeout))
                        write_results(results, out)
    _report(results, out)
    ran = [run for run in results.runs if not run.refused]
    failed = sum(run.measured is None for run in ran)
    if failed:
        raise ClusterError(f"{failed} of {len(ran)} runs failed; their logs are in {out / 'jobs'}.")


def _all(name: str) -> list[str]:
    """Return the systems of --all on a network. On one machine only systems with sockets send, and so encode, anything."""
    transport = "socket," if name == network.LOOPBACK else ""
    return [*_ALL, *(f"ours:{transport}{codec}" for codec in _CODECS)]


def _entries(systems: Sequence[str]) -> list[Entry]:
    entries = [parse_entry(text) for text in systems]
    twice = {entry.name for entry in entries if [e.name for e in entries].count(entry.name) > 1}
    if twice:
        raise UsageError(f"--system '{twice.pop()}' was given twice; give them names, as in --system 'NAME=ours'.")
    return entries


def _is_default(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) == click.core.ParameterSource.DEFAULT


def _prepare(out: Path) -> None:
    try:
        shutil.rmtree(out / "jobs", ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {out} cannot be made: {error.strerror}.") from None


def _run(name: str, entry: Entry, job: Job, repeat: int, signals: StopSignals, warmup: int, timeout: float) -> Result:
    """Run and show one job on a network, and return the result. A failure and a refusal by the system are results too."""
    model = job.workload.name
    title = f"{name} {model} {entry.name} #{repeat + 1}"
    if why := entry.refuses(job.workload):
        print(f"{title}: refused: {why}", flush=True)
        return Result(name, model, entry.name, repeat, None, why, refused=True)
    try:
        measured = measure.run(entry.commands(job), job, signals, warmup, timeout)
    except ClusterError as error:
        print(f"{title}: failed: {error}", flush=True)
        return Result(name, model, entry.name, repeat, None, str(error))
    print(
        f"{title}: {measured.step_ms:.1f} ms/step, {measured.cpu_s:.3f} CPU s/step, {measured.memory_mb:.0f} MB, "
        f"loss {measured.loss:.5f}",
        flush=True,
    )
    return Result(name, model, entry.name, repeat, msgspec.structs.replace(measured, wire=entry.wire(job)))


def _report(results: Results, out: Path) -> None:
    paths = write_report(results, out)
    print(f"\n{to_markdown(results)}\nwritten: {', '.join(map(str, paths))}")


if __name__ == "__main__":
    sys.exit(run_command(cli, sys.argv[1:], "python -m benchmarks"))
