"""A table of experiments: the accuracy of merged replicas, of each replica alone, and of synchronous training.

`python -m benchmarks.merging FOLDER...` reads the results of `launch.py experiment examples/merging.toml`, and of other
experiments with the same cases. Each is a column. Accuracy is measured on held-out images that the greedy merge did not use.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import mean, stdev

import click
from safetensors.torch import load_file

from roundtable.cluster.commands.report import TABLE_FILE
from roundtable.cluster.run.exit_codes import run_command
from roundtable.common.config.settings import Settings, make_settings, read_toml
from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage.event_log import FILE_NAME, RunLogReader
from roundtable.common.storage.run_files import MODEL_FILE, SETTINGS_FILE
from roundtable.worker import data
from roundtable.worker.models import builtin
from roundtable.worker.tools.builtin_script import accuracy, halves

#: Name of a case -> its results over the seeds.
Column = dict[str, list[float]]


def read_experiment(folder: Path) -> tuple[str, Column]:
    """Return a column's title, and the accuracies of the runs in `folder`. Raises UsageError if there are no runs."""
    found: Column = defaultdict(list)
    title = ""
    for run in _runs(folder):
        settings = make_settings(read_toml(run / SETTINGS_FILE), str(run / SETTINGS_FILE))
        title = f"{settings.example.model}, {settings.example.data}"
        case = run.name.replace(f"-seed-{settings.seed}", "")
        found[case].append(measure(run / MODEL_FILE, settings))
        if settings.policy == "average" and settings.average_weights_by == "greedy":
            with closing(RunLogReader(run / FILE_NAME)) as log:
                parts = [value for *_, value in log.metrics("part_accuracy")]
                found["parts merged by greedy"] += [value for *_, value in log.metrics("merged_parts")]
            found["one part, mean"].append(mean(parts))
            found["one part, best"].append(max(parts))
    if not found:
        raise UsageError(f"{folder} holds no finished runs: give the folder of an experiment.")
    return title, found


def _runs(folder: Path) -> list[Path]:
    """Return the folders of the finished runs, in the order of the experiment."""
    try:
        with (folder / TABLE_FILE).open(newline="", encoding="utf-8") as file:
            runs = [folder / row["name"] for row in csv.DictReader(file)]
    except (OSError, KeyError):
        raise UsageError(f"{folder} is not the folder of an experiment: it has no table of runs.") from None
    return [run for run in runs if (run / MODEL_FILE).exists()]


def measure(file: Path, settings: Settings) -> float:
    """Return the accuracy of a model of the built-in example on the half of the held-out images by which nothing was chosen."""
    images = data.chosen(settings)
    model = builtin.build(settings.example.model, images.shape, images.classes)
    model.load_state_dict(load_file(file))
    return accuracy(model, halves(images.test)[1])


def to_markdown(columns: Sequence[tuple[str, Column]]) -> str:
    """Return the table, a row for each case in the order of the columns: mean ± standard deviation over the seeds."""
    cases = dict.fromkeys(case for _, column in columns for case in column)
    lines = [["", *(title for title, _ in columns)], ["---", *("---:" for _ in columns)]]
    lines += [[case, *(_cell(case, column.get(case, [])) for _, column in columns)] for case in cases]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(case: str, values: Sequence[float]) -> str:
    if not values:
        return ""
    if case.startswith("parts"):
        return ", ".join(f"{value:g}" for value in values)
    spread = f" ± {stdev(values) * 100:.1f}" if len(values) > 1 else ""
    return f"{mean(values) * 100:.1f}{spread}"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
def cli(folders: Sequence[Path]) -> None:
    """Print a table of accuracies, in percent, of the experiments in FOLDERS."""
    click.echo(to_markdown([read_experiment(folder) for folder in folders]), nl=False)


if __name__ == "__main__":
    sys.exit(run_command(cli, sys.argv[1:], "merging"))
