"""The fault matrix: real runs to which something happens, and whether the result is that of a run to which nothing did.

`python -m benchmarks.faults` prints a table in Markdown. Processes are killed with -9 or stopped while rounds go on, at whatever
they are doing just then; a row can be repeated so that this differs.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.live import TRAINING, Cluster
from common import snapshots
from common.runlog import RunLogReader

_SERVERS = 3
_WORKERS = 3
#: Rounds before anything happens.
_ROUNDS = 20
#: Events that show that somebody has noticed.
_NOTICED = ("lost", "joined", "restarted", "recovered", "rolled back", "refused")

Harm = Callable[[Cluster], Cluster]


@dataclass(frozen=True)
class Outcome:
    """What came of a run. Seconds are until the first event that tells of it, and the longest without a committed round."""

    problem: str
    same: bool
    exact: bool
    noticed_s: float | None
    pause_s: float
    recomputed: int


def kill(*names: str) -> Harm:
    """kill -9 of these processes at once."""

    def harm(run: Cluster) -> Cluster:
        for name in names:
            run.signal(name)
        return run

    return harm


def stop(name: str, seconds: float) -> Harm:
    """SIGSTOP, and SIGCONT after so long."""

    def harm(run: Cluster) -> Cluster:
        pid = run.pids()[name]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        return run

    return harm


def power_loss(damaged: bool) -> Harm:
    """All are killed at once, and the run goes on by `--resume`, with a byte of its newest snapshot changed if `damaged`."""

    def harm(run: Cluster) -> Cluster:
        run.until(lambda: len(run.events("snapshot")) > 1, "second snapshot")
        run.cut_power()
        if damaged:
            whole = [path for path in snapshots.folders(run.folder) if (path / snapshots.MANIFEST_FILE).exists()]
            file = whole[-1] / snapshots.file_of(0)
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        return Cluster(run.folder, "--resume", run.folder)

    return harm


def storm(run: Cluster) -> Cluster:
    """200 connections at once that say nothing, an HTTP request or random bytes, to the coordinator and to a server."""
    addresses = [(run.folder / "address").read_text().strip()]
    addresses += [event.data["address"] for event in run.events("joined") if event.process == "server-0"][-1:]
    sockets = []
    for n in range(200):
        host, _, port = addresses[n % len(addresses)].removeprefix("tcp://").rpartition(":")
        with suppress(OSError):
            sock = socket.create_connection((host, int(port)), timeout=2)
            sock.sendall([b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", os.urandom(300)][n % 3])
            sockets.append(sock)
    time.sleep(1.0)
    for sock in sockets:
        sock.close()
    return run


def churn(seconds: float) -> Harm:
    """Every second or so some worker, server or the coordinator is killed; each only so often as the launcher starts it again."""

    def harm(run: Cluster) -> Cluster:
        chance, end = random.Random(0), time.monotonic() + seconds
        while time.monotonic() < end and run.is_running:
            time.sleep(chance.uniform(0.5, 2.0))
            pids = run.pids()
            name = chance.choice(sorted(pids))
            with suppress(ProcessLookupError):
                os.kill(pids[name], signal.SIGKILL)
        return run

    return harm


def rows(churn_s: float) -> dict[str, tuple[Harm, Sequence[object]]]:
    """Each fault, and flags that its run needs."""
    everybody = ("coordinator", *(f"server-{n}" for n in range(_SERVERS)), *(f"worker-{n}" for n in range(_WORKERS)))
    long = ("--epochs", 60, "--respawn", 1000)
    return {
        "nothing": (lambda run: run, ()),
        "worker killed": (kill("worker-1"), ()),
        "all workers killed": (kill(*(f"worker-{n}" for n in range(_WORKERS))), ()),
        "worker stopped 6 s, then woken": (stop("worker-1", 6.0), ()),
        "server killed": (kill("server-1"), ()),
        "two of three servers killed": (kill("server-0", "server-2"), ()),
        "server stopped 18 s, then woken": (stop("server-1", 18.0), ()),
        "coordinator killed": (kill("coordinator"), ()),
        "coordinator stopped 6 s, then woken": (stop("coordinator", 6.0), ()),
        "coordinator and a server killed": (kill("coordinator", "server-1"), ()),
        "coordinator and a worker killed": (kill("coordinator", "worker-1"), ()),
        "all but the launcher killed": (kill(*everybody), ()),
        "power loss, then --resume": (power_loss(damaged=False), ()),
        "power loss, newest snapshot damaged": (power_loss(damaged=True), ()),
        "200 strange connections": (storm, ()),
        f"{churn_s:.0f} s of random kills": (churn(churn_s), long),
    }


def measure(harm: Harm, flags: Sequence[object], expected: str, folder: Path) -> Outcome:
    """Start a run, do the harm in the middle of it, and look at what comes of it. `expected` is the hash of its weights."""
    run = Cluster(folder, "--run-dir", folder, *TRAINING, "--workers", _WORKERS, "--servers", _SERVERS, *flags)
    try:
        run.until(lambda: run.rounds() > _ROUNDS and run.events("snapshot"), "training")
        began = time.time()
        run = harm(run)
        summary = run.summary()
    except AssertionError as error:
        return Outcome(str(error).strip().splitlines()[-1], False, False, None, 0.0, 0)
    finally:
        run.close()
    events = [(at, event) for _, at, event in run.read(RunLogReader.events) if at >= began]
    noticed = [at - began for at, event in events if event.kind in _NOTICED]
    times = [began, *(at for row in run.read(RunLogReader.rounds) if (at := row.at) > began)]
    pause = max((b - a for a, b in itertools.pairwise(times)), default=0.0)
    same = not expected or summary["weights_sha256"] == expected
    return Outcome("", same, run.is_exact(), min(noticed, default=None), pause, summary["micro_batches_recomputed"])


def line(name: str, outcome: Outcome) -> str:
    """A row of the table."""
    noticed = "" if outcome.noticed_s is None else f"{outcome.noticed_s:.1f}"
    if outcome.problem:
        return f"| {name} | **no**: {outcome.problem} | | | | | |"
    words = ["yes" if good else "**no**" for good in (True, outcome.same, outcome.exact)]
    return f"| {name} | {' | '.join(words)} | {noticed} | {outcome.pause_s:.1f} | {outcome.recomputed} |"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--row", "wanted", multiple=True, help="Only this row; repeatable. By default all.")
@click.option("--times", type=click.IntRange(min=1), default=1, show_default=True, help="Runs of each row.")
@click.option(
    "--churn", "churn_s", type=click.FloatRange(min=1), default=30.0, show_default=True, help="Seconds of random kills."
)
@click.option("--out", type=click.Path(path_type=Path), help="File for the table, too.")
def cli(wanted: Sequence[str], times: int, churn_s: float, out: Path | None) -> None:
    """Do harm to real runs, and compare their weights and books with those of a run that nothing disturbed.

    The exit code is 1 where a row does not hold.
    """
    table = rows(churn_s)
    unknown = set(wanted) - table.keys()
    if unknown:
        raise click.UsageError(f"there is no row '{min(unknown)}'; there are {', '.join(table)}.")
    heads = "fault", "finished", "same bits", "each sample once", "noticed after s", "longest pause s", "micro-batches again"
    lines = [f"| {' | '.join(heads)} |", "| --- | --- | --- | --- | ---: | ---: | ---: |"]
    print("\n".join(lines), flush=True)
    expected: dict[tuple[object, ...], str] = {}
    failed = False
    with tempfile.TemporaryDirectory() as name:
        for number, (row, (harm, flags)) in enumerate((row, table[row]) for row in table if not wanted or row in wanted):
            key = tuple(flags)
            if key not in expected:
                folder = Path(name) / f"quiet-{number}"
                expected[key] = str(Cluster(folder, "--run-dir", folder, *TRAINING, *flags).summary()["weights_sha256"])
            for time_ in range(times):
                outcome = measure(harm, flags, expected[key], Path(name) / f"{number}-{time_}")
                failed |= bool(outcome.problem) or not outcome.same or not outcome.exact
                lines.append(line(row, outcome))
                print(lines[-1], flush=True)
    if out is not None:
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(failed)


if __name__ == "__main__":
    cli()
