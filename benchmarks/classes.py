"""Classifiers on the servers: `python -m benchmarks.classes` trains `examples/sharded_classifier.py`.

For each number of classes it prints the time and the traffic of a round, and the memory of all processes together.
"""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import click

from benchmarks import LAUNCH, ROOT
from benchmarks.compare.measure import Usage, watch
from benchmarks.compare.report import markdown_table
from roundtable.cluster.process.children import Processes
from roundtable.cluster.process.signals import StopSignals
from roundtable.cluster.run.run_directory import LOGS
from roundtable.common.runtime.errors import ClusterError
from roundtable.common.storage.event_log import FILE_NAME, RunLogReader

FEATURES, MICRO_BATCHES = 128, 2
_TRAVELLED = re.compile(r"and ([\d.]+) MB travelled")


@dataclass(frozen=True)
class Cost:
    """The cost of one run: seconds of each round after the first, MB that travelled in a round, and the peak memory.

    The peak memory is the largest sum of proportional set sizes, in bytes.
    """

    round_s: list[float]
    megabytes: float
    memory: int


def measure(
    classes: int,
    rounds: int,
    batch: int,
    momentum: float,
    checkpoint_every: float,
    timeout: float,
    folder: Path,
    signals: StopSignals,
) -> Cost:
    """Train `rounds` rounds of `batch` samples with one worker and two servers, and hand in the model."""
    flags = [
        "--workers",
        1,
        "--servers",
        2,
        "--rounds",
        rounds,
        "--run-dir",
        folder / "run",
        "--checkpoint-every",
        checkpoint_every,
    ]
    script = [ROOT / "examples" / "sharded_classifier.py", "--", "--classes", classes, "--features", FEATURES]
    sizes = ["--samples", batch * rounds, "--micro-batch", batch // MICRO_BATCHES, "--global-batch", batch, "--held-out", 32]
    command = [sys.executable, LAUNCH, "local", *flags, *script, *sizes, "--epochs", 1, "--momentum", momentum]
    usage = Usage()
    with Processes(folder / LOGS, {"PYTHONPATH": str(ROOT)}) as processes:
        processes.start("launcher", list(map(str, command)))
        watch(processes, signals, timeout, lambda: usage.look([child.popen.pid for child in processes.running()]))
    told = _TRAVELLED.search((folder / "run" / LOGS / "worker-0.log").read_text(encoding="utf-8"))
    if told is None:
        raise ClusterError("the example's worker has not logged its traffic.")
    ended = [row.at for row in RunLogReader(folder / "run" / FILE_NAME).rounds()]
    return Cost([after - before for before, after in pairwise(ended)], float(told[1]), usage.memory)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--classes", multiple=True, type=click.IntRange(2), default=(100_000, 1_000_000), show_default=True,
              help="Repeatable; ten million take two minutes and 6 GB.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(2), default=6, show_default=True)
@click.option("--batch", type=click.IntRange(2), default=64, show_default=True, help="Samples of a round.")
@click.option("--momentum", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Above 0 it doubles the numbers.")
@click.option("--checkpoint-every", type=click.FloatRange(0), default=0.0, show_default=True, help="Seconds; 0: none.")
@click.option("--timeout", type=click.FloatRange(1), default=1800.0, show_default=True, help="Seconds for one run.")
def cli(classes: Sequence[int], rounds: int, batch: int, momentum: float, checkpoint_every: float, timeout: float) -> None:
    """Measure, and print the table as Markdown."""
    table = [("classes", "a round, s", "MB a round", "memory, GB", "weights, GB")]
    with StopSignals() as signals:
        for count in classes:
            with tempfile.TemporaryDirectory() as folder:
                cost = measure(count, rounds, batch, momentum, checkpoint_every, timeout, Path(folder), signals)
            seconds = f"{statistics.median(cost.round_s):.2f} ({min(cost.round_s):.2f}..{max(cost.round_s):.2f})"
            weights = 4 * FEATURES * count / 1e9
            table.append((f"{count:,}", seconds, f"{cost.megabytes:.2f}", f"{cost.memory / 1e9:.2f}", f"{weights:.2f}"))
            click.echo(f"{count:,} classes: {seconds} s a round", err=True)
    click.echo(markdown_table(table, 0))


if __name__ == "__main__":
    cli()
