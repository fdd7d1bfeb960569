"""The fault matrix: do harm to real runs, and compare their results with those of an undisturbed run.

`python -m benchmarks.faults` prints a table in Markdown. A process fails at a named point of the code
(`common/runtime/failpoints.py`), or is killed or stopped at any moment while rounds go on. A row can be repeated, so that the
moment differs.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks import network
from benchmarks.faults.measuring import measure
from benchmarks.faults.outcome import HEADS, Outcome, line
from benchmarks.faults.rows import rows
from benchmarks.live import Cluster
from roundtable.common.runtime.errors import PsError, UsageError

_QUICK = ("a worker, at pushed", "a server, at applying", "the coordinator, at reported", "power loss, then --resume")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--row", "wanted", multiple=True, help="Only rows whose name contains this (repeatable; default: all).")
@click.option("--quick", is_flag=True, help="A few rows only.")
@click.option("--times", type=click.IntRange(min=1), default=1, show_default=True, help="Runs of each row.")
@click.option(
    "--churn", "churn_s", type=click.FloatRange(1, 600), default=30.0, show_default=True, help="Seconds of random kills."
)
@click.option("--out", type=click.Path(path_type=Path), help="File for the table, too.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder, which is made, in which the runs are to stay.")
def cli(wanted: Sequence[str], quick: bool, times: int, churn_s: float, out: Path | None, keep: Path | None) -> None:
    """Do harm to real runs, and compare their weights and ledgers with those of an undisturbed run.

    The exit code is 1 if a row does not hold. Seconds out of bounds are only shown, because a busy machine is slow.
    """
    lines = [f"| {' | '.join(HEADS)} |", f"| {' | '.join(['---'] * 5 + ['---:'] * 4)} |"]
    expected: dict[tuple[object, ...], str] = {}
    failed = False
    network.remove_stale()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if keep is None else keep.resolve()
        folder.mkdir(exist_ok=keep is None)
        tables = [rows(churn_s, folder / f"time-{time_}") for time_ in range(times)]  # each repeat begins with an empty folder
        table = tables[0]
        unknown = [part for part in wanted if not any(part in name for name in table)]
        if unknown:
            raise click.UsageError(f"there is no row '{unknown[0]}'; there are {', '.join(table)}.")
        chosen = {
            n: row for n, row in table.items() if (not quick or n in _QUICK) and (not wanted or any(w in n for w in wanted))
        }
        print("\n".join(lines), flush=True)
        for number, (name, row) in enumerate(chosen.items()):
            key = (*row.flags, *row.script)
            if key not in expected and not row.is_inexact:
                place = folder / f"quiet-{number}"
                expected[key] = str(Cluster(place, "--run-dir", place, *row.training, *row.script).summary()["weights_sha256"])
            for time_, again in enumerate(tables):
                try:
                    outcome = measure(again[name], expected.get(key, ""), folder / f"{number}-{time_}")
                except (PsError, UsageError) as error:
                    outcome = Outcome(f"not possible here: {error}")
                failed |= not outcome.holds
                lines.append(line(name, outcome, row.is_inexact, row.bounds))
                print(lines[-1], flush=True)
    if out is not None:
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(failed)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that SIGTERM ends all processes and removes all files
    cli()
