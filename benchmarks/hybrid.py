"""Data parallelism against the hybrid: `python -m benchmarks.hybrid` prints traffic and time of a round of each, through sockets.

The table is by the number of classes and of samples. It also has the number of samples at which both move the same bytes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks import LAUNCH, SCRIPTS
from benchmarks.scripts.train_hybrid import FEATURES, HIDDEN
from roundtable.common.storage.event_log import RunLogReader

#: Seconds. No worker may count as lost on a busy machine, because the work of another one in its place would falsify the costs.
_HEARTBEAT_TIMEOUT_S = 120


@dataclass(frozen=True)
class Cost:
    """The cost of one round of all workers: MB (10^6 bytes) through sockets, and seconds."""

    megabytes: float
    seconds: float


def measure(classes: int, batch: int, hybrid: bool, workers: int, servers: int, rounds: int) -> Cost:
    """Train `rounds` rounds of `batch` samples a worker, after a first one, and return the cost of a round.

    The first round does not count, nor do the model's first and last weights. Repeated messages count.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--workers", workers, "--servers", servers, "--transport", "tcp", "--checkpoint-every", 0, "--run-dir", folder]
        flags += ["--heartbeat-timeout", _HEARTBEAT_TIMEOUT_S]
        script = [SCRIPTS / "train_hybrid.py", "--", "--classes", classes, "--batch", batch, "--rounds", 1 + rounds]
        command = [sys.executable, LAUNCH, "local", *flags, *script, *["--hybrid"] * hybrid]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        log = RunLogReader(Path(folder) / "events.sqlite")
        megabytes, seconds = ([value for _, _, _, value in log.metrics(name)] for name in ("megabytes", "seconds"))
        lost = [event.process for _, _, event in log.events() if event.kind == "lost"]
    if lost or len(megabytes) != workers:
        raise click.ClickException(f"{', '.join(lost) or 'a worker'} died on the way, and others did its work: measure again.")
    return Cost(sum(megabytes), seconds[0])


def crossing(classes: int, servers: int) -> float:
    """Return the samples a worker at which both ways move the same bytes, by docs/tutorial/layers-on-servers.md."""
    inputs, outputs = (FEATURES, HIDDEN, HIDDEN), (HIDDEN, HIDDEN, classes)
    weights = sum((i + 1) * o for i, o in zip(inputs, outputs, strict=True))
    return weights / (servers * sum(inputs) + sum(outputs[:-1]))


@click.command()
@click.option("--classes", multiple=True, type=int, default=(10, 1000, 10_000), show_default=True)
@click.option(
    "--batch", "batches", multiple=True, type=int, default=(32, 256, 2048), show_default=True, help="Samples of a worker."
)
@click.option("--workers", default=2, show_default=True)
@click.option("--servers", default=2, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def cli(classes: tuple[int, ...], batches: tuple[int, ...], workers: int, servers: int, rounds: int) -> None:
    """Print the table as Markdown."""
    click.echo(f"Layers {FEATURES}-{HIDDEN}-{HIDDEN}-classes, {workers} workers, {servers} servers; MB and seconds of a round.\n")
    click.echo("| classes | samples a worker | data, MB | hybrid, MB | data, s | hybrid, s | bytes cross at |")
    click.echo("|---|---|---|---|---|---|---|")
    for count in classes:
        for batch in batches:
            data, hybrid = (measure(count, batch, way, workers, servers, rounds) for way in (False, True))
            traffic = f"{data.megabytes:.1f} | {hybrid.megabytes:.1f}"
            click.echo(
                f"| {count} | {batch} | {traffic} | {data.seconds:.2f} | {hybrid.seconds:.2f} | {crossing(count, servers):.0f} |"
            )


if __name__ == "__main__":
    cli()
