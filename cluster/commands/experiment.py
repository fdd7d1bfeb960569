"""Experiments: a file names the settings to compare. Their runs go one after another on this machine.

[settings]                       # for all runs
data = "digits"

[matrix]                         # every combination is a run
policy = ["sync", "async"]
workers = [1, 2]

[[case]]                         # optional: settings that belong together, under a name;
name = "adam"                    # each is run with every combination of the matrix
optimizer = "AdamW"
lr = 1e-3
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from roundtable.cluster.commands.report import TABLE_FILE, Outcome, write_report
from roundtable.cluster.launch.checks import check_order
from roundtable.cluster.launch.local import LaunchSpec, run_local
from roundtable.cluster.options.flags import Choice
from roundtable.cluster.options.resume import take_up
from roundtable.cluster.process.output import forgiving_output
from roundtable.cluster.run.console import Screen, say
from roundtable.cluster.run.run_directory import claim, is_folder_name, kept, read_summary, run_values
from roundtable.cluster.run.summary import results_line
from roundtable.common.config.old_names import with_new_names
from roundtable.common.config.settings import Settings, check_values, make_settings, read_toml, unknown_key
from roundtable.common.runtime.errors import ClusterError, PsError, UsageError
from roundtable.common.runtime.extras import require
from roundtable.common.storage.event_log import FILE_NAME
from roundtable.common.storage.run_files import RUNS, SETTINGS_FILE, How

_KEYS = ("args", "case", "matrix", "name", "out", "script", "settings")


@dataclass(frozen=True)
class Case:
    """One run of an experiment. `name` is the name of its folder, and of its line in the table and the plot."""

    name: str
    settings: Settings

    def outcome(self, folder: Path, summary: Mapping[str, Any] | None = None, error: str = "") -> Outcome:
        return Outcome(self.name, self.settings, folder, summary, error)


@dataclass(frozen=True)
class Experiment:
    """Runs to compare. Each runs `script` with `args` in out/<name of the case>. `script` None is the built-in example."""

    name: str
    out: Path
    cases: tuple[Case, ...]
    script: str | None = None
    args: tuple[str, ...] = ()

    def order(self, case: Case) -> LaunchSpec:
        return LaunchSpec(case.settings, self.out / case.name, self.script, self.args)


def read_experiment(file: Path) -> Experiment:
    """Return the experiment in `file`. Raises UsageError with one sentence if the file is wrong."""
    if not file.exists():
        raise UsageError(f"there is no file {file}; an experiment is a TOML file, such as examples/policies.toml.")
    values = read_toml(file)
    for key in values:
        if key not in _KEYS:
            raise unknown_key(key, list(_KEYS), str(file))
    name = _text(values, "name", file) or file.stem
    _check_name(name, f"{file}: name")
    out = _text(values, "out", file)
    args = values.get("args", [])
    if not isinstance(args, list) or not all(isinstance(arg, str) for arg in args):
        raise UsageError(f"{file}: args must be a list of strings.")
    script = _text(values, "script", file)
    if args and script is None:
        raise UsageError(f"{file}: args go to a script, but there is no script.")
    cases = _cases(values, file)
    for case in cases:
        check_order(case.settings, script, 0)
    return Experiment(name, Path(out) if out else RUNS / "experiments" / name, cases, script, tuple(args))


def _text(values: Mapping[str, Any], key: str, file: Path) -> str | None:
    value = values.get(key)
    if value is not None and (not isinstance(value, str) or not value):
        raise UsageError(f"{file}: {key} must be a string that is not empty (got {value!r}).")
    return value


def _check_name(name: str, where: str) -> None:
    if not is_folder_name(name):
        raise UsageError(f"{where} must be a folder's name (got {name!r}).")


def _cases(values: Mapping[str, Any], file: Path) -> tuple[Case, ...]:
    """Return every case of the file with every combination of its matrix."""
    common = _table(values.get("settings", {}), f"{file}: [settings]")
    matrix = _matrix(values.get("matrix"), file)
    tables = values.get("case", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{file}: a case is written as a table of its own, under [[case]].")
    if not tables and not matrix:
        raise UsageError(f"{file}: there is nothing to run: give a [matrix] of lists of settings, or [[case]] tables.")
    cases: dict[str, Case] = {}
    for number, table in enumerate(tables or [{}], 1):
        where = f"{file}: case {number}"
        own = dict(table)
        parts = []
        if tables:
            name = own.pop("name", None)
            if not isinstance(name, str):
                raise UsageError(f'{where} has no name: give it name = "...", for the table and the plot.')
            _check_name(name, f"{where}: name")
            parts = [name]
        own = _table(own, where)
        if both := sorted(own.keys() & matrix.keys()):
            raise UsageError(f"{where} sets {both[0]}, which the [matrix] varies: leave it to one of them.")
        for combination in itertools.product(*matrix.values()):
            chosen = dict(zip(matrix, combination, strict=True))
            label = "-".join([*parts, *(_label(key, value) for key, value in chosen.items())])
            if label in cases:
                raise UsageError(f"{file}: two runs are called '{label}'; each needs a name of its own.")
            _check_name(label, f"{file}: a run's name")
            cases[label] = Case(label, _settings({**common, **own, **chosen}, f"{file}: {label}"))
    return tuple(cases.values())


def _settings(values: dict[str, Any], where: str) -> Settings:
    try:
        return make_settings(values, where)
    except UsageError as error:  # the values were checked one by one, so their combination is wrong
        raise UsageError(f"{where}: {error}") from None


def _table(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UsageError(f"{where} must be a table of settings.")
    return check_values(values, where)


def _matrix(values: Any, file: Path) -> dict[str, list[Any]]:
    if values is None:
        return {}
    where = f"{file}: [matrix]"
    if not isinstance(values, dict) or not values:
        raise UsageError(f"{where} is empty: give each setting to vary a list of its values.")
    matrix = with_new_names(values, where)
    for key, choices in matrix.items():
        if not isinstance(choices, list) or not choices:
            raise UsageError(f"{where}: {key} must be a list of the values to try, and not empty (got {choices!r}).")
        for choice in choices:
            check_values({key: choice}, where)
    return matrix


def _label(key: str, value: Any) -> str:
    """Return the part of a case's name for a setting. A word stands alone, a number does not: 'async', 'workers-2'."""
    return value.replace("/", "-").strip(".-") if isinstance(value, str) else f"{key}-{str(value).lower()}"


@forgiving_output()
def run_experiment(
    experiment: Experiment, program: Sequence[str], env: Mapping[str, str], console: Console, overwrite: bool
) -> list[Outcome]:
    """Run the cases that have not finished before with the same settings, or all with `overwrite`. Return all outcomes.

    An unfinished run goes on. If its settings are others, it is left alone, and reported as failed. `program` is as in run_local.
    The report is written after each run, so that an interrupted experiment has one. Raises ClusterError at the end if a run
    failed, UsageError if the `out` folder cannot be used, and KeyboardInterrupt as run_local does.
    """
    require("experiment", "matplotlib")
    _check_out(experiment)
    outcomes: list[Outcome] = []
    settings = [case.settings for case in experiment.cases]
    paths: list[Path] = []
    for number, case in enumerate(experiment.cases, 1):
        order = experiment.order(case)
        finished = None if overwrite else _finished(order)
        say(console, f"[{number}/{len(settings)}] {case.name}" + (" has finished before" if finished is not None else ""))
        if finished is not None:
            outcomes.append(case.outcome(order.run_dir, finished))
        else:
            outcomes.append(_run(case, order, program, env, console, overwrite))
        try:
            paths = write_report(outcomes, settings, experiment.name, experiment.out)
        except OSError as error:
            raise ClusterError(f"the results cannot be written to {experiment.out}: {error.strerror or error}.") from None
    for line in _comparison(outcomes):
        say(console, line)
    say(console, f"the results are in {', '.join(map(str, paths))}")
    if failed := [outcome.name for outcome in outcomes if outcome.error]:
        raise ClusterError(f"{len(failed)} of {len(outcomes)} runs failed: {', '.join(failed)}; {paths[1]} says why.")
    return outcomes


def _check_out(experiment: Experiment) -> None:
    """Raise UsageError if the folder holds anything else: an experiment replaces its own finished runs without asking."""
    out = experiment.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()) and not (out / TABLE_FILE).exists():
            raise UsageError(f"{out} is not empty and holds no experiment: choose an empty or new folder as out.")
        (out / TABLE_FILE).touch()
    except FileExistsError:
        raise UsageError(f"{out} is a file; an experiment's out must be a folder.") from None
    except OSError as error:
        raise UsageError(f"the folder {out} cannot be written: {error.strerror}.") from None


def _finished(order: LaunchSpec) -> dict[str, Any] | None:
    """Return the summary of a run that has finished with the settings of `order`, or None."""
    try:
        before = tomllib.loads((order.run_dir / SETTINGS_FILE).read_text(encoding="utf-8"))
        summary = read_summary(order.run_dir)
    except (OSError, ValueError, UsageError):
        return None
    return summary if before == run_values(order.settings, order.script, order.args) else None


def _run(
    case: Case, order: LaunchSpec, program: Sequence[str], env: Mapping[str, str], console: Console, overwrite: bool
) -> Outcome:
    """Run a case, or resume it if it is unfinished, and return the outcome. Replace a run that finished with other settings."""

    def how(folder: Path) -> How:
        if overwrite or read_summary(folder) is not None or not kept(folder):
            return "begin"
        choice = Choice(order.settings, folder, overwrite, 0, order.script, order.args)
        return take_up(folder, choice, recovers=False, accept_versions=False, say=lambda line: say(console, line))

    try:
        with claim(order.run_dir, case.name, True, how) as (folder, chosen):
            summary = run_local(replace(order, how=chosen), program, env, Screen(console, folder / FILE_NAME))
        return case.outcome(order.run_dir, summary)
    except PsError as error:
        sentence = " ".join(str(error).split())
        say(console, f"failed: {sentence}")
        return case.outcome(order.run_dir, error=sentence)


def _comparison(outcomes: Sequence[Outcome]) -> list[str]:
    """Return one line for each run."""
    width = max(len(outcome.name) for outcome in outcomes)
    return [f"{o.name:<{width}}  " + (results_line(o.summary) if o.summary else "failed") for o in outcomes]
