"""Experiments: which runs a file stands for, that none is run twice, and what is left behind. Runs are stubs."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from roundtable.cluster.commands.experiment import read_experiment, run_experiment
from roundtable.cluster.commands.report import Outcome, rows, to_csv, to_markdown
from roundtable.cluster.run.run_directory import kept
from roundtable.common.config.example_settings import ExampleSettings
from roundtable.common.config.settings import Settings
from roundtable.common.runtime.errors import ClusterError, UsageError
from roundtable.common.storage.event_log import FILE_NAME, Event, RoundRow, RunLog

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, str(Path(__file__).with_name("stub_program.py"))]
ENV = {**os.environ, "STUB_COORDINATOR": "seed", "STUB_SERVER_0": "exit 0", "STUB_WORKER_0": "exit 0"}
FILE = """
[settings]
workers = 1
servers = 1
[matrix]
seed = [0, 3]
[[case]]
name = "slow"
lr = 0.1
[[case]]
name = "fast"
lr = 0.5
"""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "e.toml") -> Path:
    Path(name).write_text(text)
    return Path(name)


def run(text: str, overwrite: bool = False) -> tuple[list[str], str]:
    """Run it; the lines shown, and the error's text."""
    console = Console(file=io.StringIO())
    error = ""
    try:
        run_experiment(read_experiment(write(text)), PROGRAM, ENV, console, overwrite)
    except ClusterError as failed:
        error = str(failed)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines(), error


def table() -> list[dict[str, str]]:
    with Path("runs/experiments/e/results.csv").open() as file:
        return list(csv.DictReader(file))


def numbered(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if line.startswith("[")]


def test_every_case_is_run_with_every_combination_of_the_matrix() -> None:
    experiment = read_experiment(write(FILE + '[[case]]\nname = "adam"\noptimizer = "Adam"\n'))
    assert [case.name for case in experiment.cases] == [
        "slow-seed-0", "slow-seed-3", "fast-seed-0", "fast-seed-3", "adam-seed-0", "adam-seed-3",
    ]  # fmt: skip
    assert [(c.settings.example.lr, c.settings.seed) for c in experiment.cases[:4]] == [(0.1, 0), (0.1, 3), (0.5, 0), (0.5, 3)]
    assert all(case.settings.workers == 1 for case in experiment.cases)


def test_a_failed_run_is_reported_and_the_others_go_on_and_the_next_time_only_it_is_run_again() -> None:
    lines, error = run(FILE)
    assert numbered(lines) == ["[1/4] slow-seed-0", "[2/4] slow-seed-3", "[3/4] fast-seed-0", "[4/4] fast-seed-3"]
    assert error == "2 of 4 runs failed: slow-seed-3, fast-seed-3; runs/experiments/e/results.md says why."
    assert [(row["name"], row["lr"], row["seed"], row["rounds"], bool(row["error"])) for row in table()] == [
        ("slow-seed-0", "0.1", "0", "3", False),
        ("slow-seed-3", "0.1", "3", "", True),
        ("fast-seed-0", "0.5", "0", "3", False),
        ("fast-seed-3", "0.5", "3", "", True),
    ]
    assert "coordinator failed with exit code 3" in Path("runs/experiments/e/results.md").read_text()
    assert Path("runs/experiments/e/results.png").read_bytes().startswith(b"\x89PNG")

    before = table()
    lines, again = run(FILE)
    assert numbered(lines) == [
        "[1/4] slow-seed-0 has finished before",
        "[2/4] slow-seed-3",
        "[3/4] fast-seed-0 has finished before",
        "[4/4] fast-seed-3",
    ]
    assert (again, table()) == (error, before)


def test_a_run_is_run_again_if_its_settings_have_changed_or_if_told_to() -> None:
    one = "[settings]\nworkers = 1\nservers = 1\n[matrix]\nseed = [0]\n"
    assert numbered(run(one)[0]) == ["[1/1] seed-0"]
    assert numbered(run(one)[0]) == ["[1/1] seed-0 has finished before"]
    assert numbered(run(one, overwrite=True)[0]) == ["[1/1] seed-0"]
    assert numbered(run(one.replace("workers = 1", "workers = 1\nlr = 0.5"))[0]) == ["[1/1] seed-0"]


def test_a_case_that_has_not_finished_goes_on_and_is_deleted_only_if_told_to() -> None:
    one = "[settings]\nworkers = 1\nservers = 1\n[matrix]\nseed = [0]\n"
    run(one)
    folder = Path("runs/experiments/e/seed-0")
    (folder / "summary.json").unlink()
    log = RunLog(folder / FILE_NAME)
    log.event(Event("started", "coordinator", {"run": "r"}))
    log.round(RoundRow(0, 0, 8, 2, 0, {}))
    log.close()
    lines, error = run(one.replace("workers = 1", "workers = 1\nlr = 0.5"))
    assert "1 of 1 runs failed" in error and any("--lr cannot change on resume (0.02 -> 0.5" in line for line in lines)
    assert kept(folder).startswith("an unfinished run, after 1 rounds")
    lines, _ = run(one)
    assert any("starts the run in runs/experiments/e/seed-0 from the beginning: it stopped at round 1" in line for line in lines)
    (folder / "summary.json").unlink()
    assert kept(folder)
    run(one, overwrite=True)
    (folder / "summary.json").unlink()
    assert not kept(folder)


def test_a_folder_of_other_things_is_not_touched() -> None:
    Path("runs/experiments/e").mkdir(parents=True)
    Path("runs/experiments/e/notes").touch()
    with pytest.raises(UsageError, match="is not empty and holds no experiment"):
        run(FILE)
    assert [path.name for path in Path("runs/experiments/e").iterdir()] == ["notes"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "there is nothing to run"),
        ("[matrix]", "[matrix] is empty"),
        ("[matrix]\nworkers = 2", "must be a list"),
        ("[matrix]\nworkers = []", "must be a list"),
        ("[matrix]\nworkers = ['2']", "workers = '2' cannot be"),
        ("[matrix]\nworkrs = [2]", "did you mean 'workers'?"),
        ("[matrix]\nworkers = [2, 2]", "two runs are called 'workers-2'"),
        ("[matrix]\nglobal-batch = [64]\nglobal_batch = [32]", "are one setting"),
        ("[matrix]\nmicro_batch = [16, 128]", "micro_batch-128: micro_batch (128) must not exceed global_batch (64)"),
        ("[matrix]\ninit = ['']", "must be a folder's name"),
        ("[matirx]\nworkers = [2]", "did you mean 'matrix'?"),
        ("settings = 3\n[matrix]\nworkers = [2]", "[settings] must be a table"),
        ("[settings]\nworkrs = 3\n[matrix]\nlr = [1.0]", "[settings]: there is no setting 'workrs'"),
        ("[[case]]\nlr = 1.0", "case 1 has no name"),
        ("[[case]]\nname = '../x'", "must be a folder's name"),
        ("[case]\nname = 'x'", "under [[case]]"),
        ("[[case]]\nname = 'x'\nlr = 1.0\n[matrix]\nlr = [1.0]", "case 1 sets lr, which the [matrix] varies"),
        ("name = 'a/b'\n[matrix]\nlr = [1.0]", "must be a folder's name"),
        ("script = 'no.py'\n[matrix]\nlr = [1.0]", "there is no script no.py"),
        ("args = ['x']\n[matrix]\nlr = [1.0]", "there is no script"),
        ("[matrix\n", "is not valid TOML"),
    ],
)
def test_a_file_that_cannot_be_is_told_in_one_sentence(text: str, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_experiment(write(text))
    assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_the_examples_can_be_read(file: Path) -> None:
    assert read_experiment(file).cases


def test_the_table_has_all_digits_as_csv_and_what_people_read_as_markdown() -> None:
    summary = {"rounds": 5, "accuracy": 0.98765, "loss": 0.123456, "weights_sha256": "0123456789abcdef"}
    outcomes = [
        Outcome("a", Settings(), Path("a"), summary),
        Outcome("b|c", Settings(example=ExampleSettings(lr=0.5)), Path("b"), error="it failed"),
    ]
    found = rows(outcomes, ["lr"])
    assert next(csv.DictReader(io.StringIO(to_csv(found))))["accuracy"] == "0.98765"
    assert to_markdown(found).splitlines() == [
        "| name |   lr | rounds |   loss | accuracy | weights_sha256 | error     |",
        "| ---- | ---: | -----: | -----: | -------: | -------------- | --------- |",
        "| a    | 0.02 |      5 | 0.1235 |   98.77% | 0123456789ab   |           |",
        "| b\\|c |  0.5 |        |        |          |                | it failed |",
    ]
