"""ps-lite's own benchmark on our servers: one worker pushes and pulls 10 million float32 through the key-value client.

`python -m benchmarks.kv` prints a line for each number of servers. Run as a worker's script, this file is the worker.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import torch

_TIMES_VARIABLE = "BENCHMARK_KV_TIMES"
_TIMEOUT_S = 600.0


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--values", type=click.IntRange(min=1), default=10_000_000, show_default=True, help="float32 values to move.")
@click.option("--times", type=click.IntRange(min=1), default=15, show_default=True, help="Pushes and pulls; the median counts.")
@click.option("--servers", multiple=True, type=click.IntRange(min=1), default=(1, 2), show_default=True, help="Repeatable.")
@click.option("--flag", "flags", multiple=True, help="Passed on to launch.py local; repeatable.")
def cli(values: int, times: int, servers: Sequence[int], flags: Sequence[str]) -> None:
    """Measure push + wait and pull + wait of the key-value client, with one worker."""
    from benchmarks import LAUNCH
    from benchmarks.compare.measure import watch
    from roundtable.cluster.process.children import Processes
    from roundtable.cluster.process.signals import StopSignals

    for count in servers:
        with tempfile.TemporaryDirectory() as temporary, StopSignals() as signals:
            folder = Path(temporary)
            settings = ["--workers", "1", "--servers", str(count), "--run-dir", str(folder / "run"), *flags]
            argv = [sys.executable, str(LAUNCH), "local", *settings, __file__, "--", str(values), str(times)]
            env = {**os.environ, "OMP_NUM_THREADS": "1", _TIMES_VARIABLE: str(folder / "times.json")}
            with Processes(folder / "logs", env) as processes:
                processes.start("launcher", argv)
                watch(processes, signals, _TIMEOUT_S)
            measured = json.loads((folder / "times.json").read_text(encoding="utf-8"))
        said = [f"{what} {statistics.median(ms):.0f} ms ({min(ms):.0f}..{max(ms):.0f})" for what, ms in measured.items()]
        print(f"{count} server{'s' if count > 1 else ''}, {values:,} float32: {', '.join(said)}", flush=True)


def work(values: int, times: int, out: Path) -> None:
    """Run as the worker."""
    import roundtable

    run = roundtable.join()
    kv = run.kv()
    here, there = torch.randn(values), torch.empty(values)
    kv.wait(kv.push("values", here, "set"))

    def milliseconds(request: Callable[[], int]) -> float:
        began = time.monotonic()
        kv.wait(request())
        return (time.monotonic() - began) * 1000.0

    measured: dict[str, list[float]] = {"push": [], "pull": []}
    for _ in range(times):
        measured["push"].append(milliseconds(lambda: kv.push("values", here)))
        measured["pull"].append(milliseconds(lambda: kv.pull("values", there)))
    if not torch.allclose(there, here * (times + 1), rtol=1e-4):
        raise SystemExit("error: what was pulled is not the sum of what was pushed.")
    out.write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    if _TIMES_VARIABLE in os.environ and len(sys.argv) == 3:
        work(int(sys.argv[1]), int(sys.argv[2]), Path(os.environ[_TIMES_VARIABLE]))
    else:
        from roundtable.cluster.run.exit_codes import run_command

        sys.exit(run_command(cli, sys.argv[1:], "python -m benchmarks.kv"))
