"""Many workers: the cost of a round and of a connection to a real coordinator and a real server, by the number of workers.

`python -m benchmarks.connections` starts the two as a run does. It also starts simulated workers (`benchmarks.simulated`), which
send as much as real ones over real sockets, and compute nothing. So the coordinator and the server are at their busiest.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import click
import msgspec

from benchmarks import LAUNCH, ROOT
from benchmarks.compare.measure import Usage, watch
from benchmarks.compare.report import markdown_table
from benchmarks.compare.systems import module_command
from benchmarks.simulated import FILES_PER_WORKER, Job
from roundtable.cluster.launch.starting import start_coordinator, start_server
from roundtable.cluster.process.children import TICK_S, Processes
from roundtable.cluster.process.signals import StopSignals
from roundtable.cluster.run.run_directory import LOGS, write_settings
from roundtable.common.config.settings import Settings
from roundtable.common.model.layout import CHUNK_BYTES
from roundtable.common.protocol.transport import allow_files
from roundtable.common.storage.run_files import SETTINGS_FILE

_PROCESSES = 2
_WARMUP = 3
_MEASURED = ("coordinator", "server-0")


@dataclass(frozen=True)
class Measurement:
    """The cost of one run."""

    workers: int
    #: Seconds of each timed round: from when all workers have the weights before it until all have the weights after it.
    round_s: list[float]
    #: Processor seconds of a timed round, of the coordinator and of the server.
    cpu_s: tuple[float, float]
    #: The largest proportional set size of the coordinator and of the server, in bytes.
    memory: tuple[int, int]
    #: The number of processors that other processes used in the timed rounds.
    others: float


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--workers", multiple=True, type=click.IntRange(min=1), default=(10, 100, 300, 1000), show_default=True,
              help="Repeatable.")  # fmt: skip
@click.option("--pushes", type=click.IntRange(min=1), default=20_000, show_default=True,
              help="Gradients that are sent in all by so many workers; at least 20 rounds are run.")  # fmt: skip
@click.option("--values", type=click.IntRange(1, CHUNK_BYTES // 4), default=4000, show_default=True, help="float32 weights.")
@click.option("--timeout", type=click.FloatRange(min=1.0), default=600.0, show_default=True, help="Seconds for one run.")
def cli(workers: Sequence[int], pushes: int, values: int, timeout: float) -> None:
    """Measure a round and a connection of a coordinator and a server with many simulated workers, and print a table."""
    allow_files(FILES_PER_WORKER * -(-max(workers) // _PROCESSES))  # the processes that this one starts inherit the limit
    measured = []
    with StopSignals() as signals:
        for count in workers:
            rounds = _WARMUP + max(20, pushes // count)
            with tempfile.TemporaryDirectory() as folder:
                measured.append(measure(count, rounds, values, timeout, Path(folder), signals))
            print(f"{count} workers: {_per_round(measured[-1])} ms a round", flush=True)
    print(f"\n{to_markdown(measured)}\n\n{_LEGEND}")


def measure(workers: int, rounds: int, values: int, timeout: float, folder: Path, signals: StopSignals) -> Measurement:
    """Run that many workers for that many rounds of a model of `values` weights, in `folder`, and return the cost.

    Raises ClusterError, which names the process and its log, if a process fails or the time is over. Raises KeyboardInterrupt on
    a signal.
    """
    settings = Settings(
        workers=workers, servers=1, global_batch=workers, micro_batch=1, epochs=1, transport="tcp", progress_timeout=timeout,
        heartbeat_timeout=timeout,  # a busy machine may silence a process, and with it many workers
    )  # fmt: skip
    write_settings(folder / SETTINGS_FILE, settings)
    program = [sys.executable, str(LAUNCH)]
    usage = {name: Usage() for name in (*_MEASURED, "all")}
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with Processes(folder / LOGS, env) as processes:

        def tick() -> None:
            time.sleep(TICK_S)
            processes.poll()

        address = start_coordinator(processes, program, folder, 0, tick)
        start_server(processes, program, address, 0)
        shares = [workers * i // _PROCESSES for i in range(_PROCESSES + 1)]
        outs = []
        for first, end in pairwise(shares):
            if end > first:
                outs.append(folder / f"{first}.json")
                job = Job(address, first, end - first, workers, rounds, values, timeout, str(outs[-1]))
                processes.start(f"workers-{first}", module_command("benchmarks.simulated", msgspec.json.encode(job).decode()))
        pids = {child.name: child.popen.pid for child in processes.children}

        def look() -> None:
            for name in _MEASURED:
                usage[name].look([pids[name]])
            usage["all"].look(list(pids.values()))

        watch(processes, signals, timeout, look)
    return _evaluate(workers, [json.loads(out.read_text(encoding="utf-8")) for out in outs], usage)


def _evaluate(workers: int, times: Sequence[Sequence[float]], usage: dict[str, Usage]) -> Measurement:
    last = [max(of_round) for of_round in zip(*times, strict=True)][_WARMUP:]
    cpu = [usage[name].between(last[0], last[-1])[0] / (len(last) - 1) for name in _MEASURED]
    memory = [usage[name].memory for name in _MEASURED]
    ours, whole = usage["all"].between(last[0], last[-1])
    others = max(0.0, whole - ours) / (last[-1] - last[0])
    return Measurement(workers, [b - a for a, b in pairwise(last)], (cpu[0], cpu[1]), (memory[0], memory[1]), others)


def to_markdown(measured: Sequence[Measurement]) -> str:
    """Return the table. The memory of a connection is the difference to the run with the fewest workers, by worker."""
    least = min(measured, key=lambda m: m.workers)
    cells: list[Sequence[str]] = [_HEADER]
    for m in measured:
        round_us = statistics.median(m.round_s) * 1e6 / m.workers
        more = m.workers - least.workers
        cells.append([
            str(m.workers),
            _per_round(m),
            f"{round_us:.0f}",
            *(f"{cpu * 1e6 / m.workers:.0f}" for cpu in m.cpu_s),
            *(f"{memory / 1e6:.0f}" for memory in m.memory),
            *(f"{(a - b) / 1e3 / more:.0f}" if more else "" for a, b in zip(m.memory, least.memory, strict=True)),
            f"{m.others:.1f}",
        ])  # fmt: skip
    return markdown_table(cells, left=0)


_HEADER = (
    "workers", "ms/round", "us/worker", "coordinator CPU us/worker", "server CPU us/worker",
    "coordinator MB", "server MB", "coordinator kB/connection", "server kB/connection", "others",
)  # fmt: skip

_LEGEND = f"""\
- ms/round: until the last worker has the new weights; median (first..ninth tenth) of the rounds after the first {_WARMUP}
- us/worker: of a round, by worker; CPU: user and system time in a round, by worker
- MB: peak of the proportional set size; kB/connection: its difference to the run with the fewest workers, by worker
- others: processors that were busy with something else in the timed rounds; if there are many, the times are disturbed"""


def _per_round(measured: Measurement) -> str:
    ms = sorted(second * 1e3 for second in measured.round_s)
    return f"{statistics.median(ms):.1f} ({ms[len(ms) // 10]:.1f}..{ms[len(ms) * 9 // 10]:.1f})"


if __name__ == "__main__":
    from roundtable.cluster.run.exit_codes import run_command

    sys.exit(run_command(cli, sys.argv[1:], "python -m benchmarks.connections"))
