"""The report of an experiment: a table of its runs, as CSV and Markdown, and a plot of loss and accuracy over time."""

from __future__ import annotations

import csv
import io
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roundtable.cluster.run.progress import mean_metric
from roundtable.cluster.run.summary import SHORT_SHA
from roundtable.common.config.settings import FIELDS, Settings, flat
from roundtable.common.storage.event_log import FILE_NAME, Event, RunLogReader

TABLE_FILE = "results.csv"
MARKDOWN_FILE = "results.md"
PLOT_FILE = "results.png"

#: Columns from a run's summary. They follow the columns of the settings that differ.
RESULTS = (
    "rounds", "merges", "epochs", "samples", "seconds", "samples_per_second", "loss", "accuracy", "micro_batches_recomputed",
    "dropped", "pushed_bytes", "pulled_bytes", "encode_seconds", "decode_seconds", "weights_sha256",
)  # fmt: skip

#: The columns that are under `wire` in the summary.
WIRE = ("pushed_bytes", "pulled_bytes", "encode_seconds", "decode_seconds")

#: Points of a line of the plot. The loss is a mean over the rounds between two points.
_POINTS = 100
#: Formats of numbers with a fraction in Markdown.
_FORMATS: Mapping[str, Callable[[Any], str]] = {
    "seconds": "{:.1f}".format,
    "encode_seconds": "{:.2f}".format,
    "decode_seconds": "{:.2f}".format,
    "samples_per_second": "{:.0f}".format,
    "loss": "{:.4f}".format,
    "accuracy": "{:.2%}".format,
}


@dataclass(frozen=True)
class Outcome:
    """How one run ended: with a summary, or with an error in one sentence."""

    name: str
    settings: Settings
    folder: Path
    summary: Mapping[str, Any] | None = None
    error: str = ""


@dataclass(frozen=True)
class Curve:
    """Loss and accuracy of one run over time: (seconds since training began, value), in order of time."""

    name: str
    loss: Sequence[tuple[float, float]] = field(default_factory=list)
    accuracy: Sequence[tuple[float, float]] = field(default_factory=list)


def differing(settings: Sequence[Settings]) -> list[str]:
    """Return the names of the settings that differ among these, in the order of their definition."""
    values = [flat(one) for one in settings]
    return [key for key in FIELDS if len({one[key] for one in values}) > 1]


def rows(outcomes: Sequence[Outcome], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Return the table, a dict per run: its name, the settings `keys`, its results, and its error. None is an empty cell."""
    table = []
    for outcome in outcomes:
        settings = flat(outcome.settings)
        summary = outcome.summary or {}
        row: dict[str, Any] = {"name": outcome.name} | {key: settings[key] for key in keys}
        # settings and results share no name
        row |= {key: summary.get(key) for key in RESULTS}
        row |= {key: summary.get("wire", {}).get(key) or None for key in WIRE}
        row["weights_sha256"] = (summary.get("weights_sha256") or "")[:SHORT_SHA] or None
        table.append(row | {"error": outcome.error or None})
    return table


def to_csv(table: Sequence[Mapping[str, Any]]) -> str:
    """Return the table as CSV, with all digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def to_markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """Return the table as Markdown, with rounded numbers and without empty columns."""
    columns = [key for key in table[0] if any(row[key] is not None for row in table)]
    cells = [columns, *([_cell(key, row[key]) for key in columns] for row in table)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    right = [all(isinstance(row[key], int | float | None) for row in table) for key in columns]
    rule = ["-" * (width - 1) + ":" if is_right else "-" * width for width, is_right in zip(widths, right, strict=True)]
    lines = [
        "| " + " | ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)) + " |"
        for line in [columns, rule, *cells[1:]]
    ]
    return "\n".join(lines) + "\n"


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    text = _FORMATS[key](value) if key in _FORMATS else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def read_curve(name: str, log: Path) -> Curve:
    """Return the curve of a run from its event log. It is empty if there is no log or training never began."""
    if not log.exists():
        return Curve(name)
    try:
        with closing(RunLogReader(log)) as reader:
            events, rounds = reader.events(), reader.rounds()
            start = next((at for _, at, event in events if event.kind == "plan"), None)
            if start is None:
                return Curve(name)
            pauses = _pauses([(at, event) for _, at, event in events], [row.at for row in rounds])

            def trained_s(at: float) -> float:
                """Return the seconds of training until the unix time `at`."""
                return at - start - sum(min(at, end) - began for began, end in pauses if began < at)

            size = -(-len(rounds) // _POINTS) or 1
            parts = [rounds[at : at + size] for at in range(0, len(rounds), size)]
            loss = [(trained_s(part[-1].at), mean) for part in parts if (mean := mean_metric(part, "loss")) is not None]
            return Curve(name, loss, [(trained_s(at), value) for at, _, _, value in reader.metrics("accuracy")])
    except sqlite3.Error:  # a run that was stopped before it wrote anything
        return Curve(name)


def _pauses(events: Sequence[tuple[float, Event]], rounds: Sequence[float]) -> list[tuple[float, float]]:
    """Return the pauses of a run, in unix seconds: from its last entry before it was resumed, until it had a plan again.

    A restart of all processes by the run itself is no pause.
    """
    found, restarts, last = [], False, float("-inf")
    for number, (at, event) in enumerate(events):
        if event.kind == "started" and number and not restarts:
            began = max([last, *(time for time in rounds if time <= at)])
            found.append((began, next((then for then, other in events[number:] if other.kind == "plan"), at)))
        if event.kind != "rolled back":  # this event is written when the run is resumed
            restarts, last = event.kind == "restarted" or (restarts and event.kind == "stopped"), at
    return found


def draw(curves: Sequence[Curve], title: str, path: Path) -> None:
    """Write a picture of loss and accuracy over time, with a line of each per run. Raises OSError if it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for number, curve in enumerate(curves):
            points = getattr(curve, what)
            style = ("-", "--", ":", "-.")[number // 10 % 4]  # colours repeat after ten
            mark = "." if what == "accuracy" or len(points) == 1 else None
            axes.plot([at for at, _ in points], [value for _, value in points], style, marker=mark, label=curve.name)
        axes.set(title=what, xlabel="seconds", xlim=(0, None))
        axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def write_report(outcomes: Sequence[Outcome], settings: Sequence[Settings], title: str, folder: Path) -> list[Path]:
    """Write the table and the plot of `outcomes` to `folder` and return the files. `settings` are those of all planned runs.

    Raises OSError if a file cannot be written.
    """
    table = rows(outcomes, differing(settings))
    paths = [folder / name for name in (TABLE_FILE, MARKDOWN_FILE, PLOT_FILE)]
    paths[0].write_text(to_csv(table), encoding="utf-8")
    paths[1].write_text(f"# {title}\n\n{to_markdown(table)}", encoding="utf-8")
    draw([read_curve(outcome.name, outcome.folder / FILE_NAME) for outcome in outcomes], title, paths[2])
    return paths
