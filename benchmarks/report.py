"""What the benchmarks leave behind: all results as JSON, and made from it a Markdown table and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.measure import Measurement
from common.errors import UsageError

RESULTS_FILE = "results.json"
TABLE_FILE = "results.md"
PLOT_FILE = "results.png"

#: The systems that others are compared with.
BASELINE, BOUND = "ddp", "independent"
#: Losses are equal to rounding if they differ by less than this part of what training has changed them by.
ROUNDING = 1e-2


class Result(msgspec.Struct, frozen=True):
    """One run: `measured` is None where it failed, and `error` says why."""

    model: str
    system: str
    repeat: int
    measured: Measurement | None
    error: str = ""


class Results(msgspec.Struct, frozen=True):
    """All runs, and in words what was measured and on what."""

    about: dict[str, str]
    runs: list[Result]

    def models(self) -> list[str]:
        return list(dict.fromkeys(run.model for run in self.runs))

    def systems(self, model: str) -> list[str]:
        return list(dict.fromkeys(run.system for run in self.runs if run.model == model))

    def of(self, model: str, system: str) -> dict[int, Measurement]:
        """The successful runs of one system, by repeat."""
        return {r.repeat: r.measured for r in self.runs if (r.model, r.system) == (model, system) and r.measured is not None}


@dataclass(frozen=True)
class Spread:
    """The median of some values, the least and the largest of them."""

    median: float
    least: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None for no values."""
        return cls(statistics.median(values), min(values), max(values)) if values else None


def ratios(
    of: dict[int, Measurement], to: dict[int, Measurement], value: Callable[[Measurement], float] = lambda m: m.step_ms
) -> Spread | None:
    """`value` of one system as a multiple of another's, repeat by repeat: what ran one after the other is compared.

    None where they have no repeat in common.
    """
    return Spread.of([value(of[repeat]) / value(to[repeat]) for repeat in of if repeat in to])


def same_loss(of: dict[int, Measurement], to: dict[int, Measurement]) -> bool | None:
    """Whether the loss of every worker in every run is that of another system to rounding; None where one of them has none.

    Each worker's and not the mean, for that of workers that never talked is nearly the same after a few steps. Measured by
    how far the loss has moved, for a loss that has hardly moved is nearly the same whatever was done wrong.
    """
    if not of or not to:
        return None
    right = statistics.median(m.loss for m in to.values())
    moved = statistics.median(abs(m.loss - m.loss_before) for m in to.values())
    return all(abs(loss - right) <= ROUNDING * moved for m in of.values() for loss in m.losses)


def to_markdown(results: Results) -> str:
    """The table, and below it what it means."""
    header = (
        "model", "system", "ms/step", f"x {BASELINE}", f"x {BOUND}", "CPU s/step", "memory MB", "loss", "as ddp", "others",
    )  # fmt: skip
    cells: list[Sequence[str]] = [header]
    for model in results.models():
        baseline, bound = results.of(model, BASELINE), results.of(model, BOUND)
        for system in results.systems(model):
            runs = results.of(model, system)
            if not runs:
                cells.append([model, system, "failed", *[""] * (len(header) - 3)])
                continue
            everything = list(runs.values())
            same = same_loss(runs, baseline)
            cells.append([
                model,
                system,
                _cell(Spread.of([m.step_ms for m in everything]), "{:.1f}"),
                _cell(ratios(runs, baseline), "{:.2f}"),
                _cell(ratios(runs, bound), "{:.2f}"),
                f"{statistics.median(m.cpu_s for m in everything):.3f}",
                f"{statistics.median(m.memory_mb for m in everything):.0f}",
                f"{statistics.median(m.loss for m in everything):.5f}",
                "" if same is None else "yes" if same else "**no**",
                f"{statistics.median(m.others for m in everything):.1f}",
            ])  # fmt: skip
    about = [f"- {key}: {value}" for key, value in results.about.items()]
    about += [f"- {run.model} {run.system}, repeat {run.repeat + 1}, failed: {run.error}" for run in results.runs if run.error]
    return "\n".join([markdown_table(cells, left=2), "", *about, "", _LEGEND])


def markdown_table(cells: Sequence[Sequence[str]], left: int) -> str:
    """A table whose first row is the header, and whose first `left` columns hold words and not numbers."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) + " |"
        for row in [cells[0], rule, *cells[1:]]
    )


_LEGEND = f"""\
- ms/step: median of worker 0's timed steps, then of the repeats (least..largest repeat); ratios are taken repeat by repeat
- CPU: user and system time of all the system's processes in the timed steps; memory: peak sum of their proportional set sizes
- loss: of the last global batch after the last step, mean over workers; as {BASELINE}: each within {ROUNDING:g} of what it moved
- others: processors that were busy with something else during the timed steps; times with much of that are disturbed
"""


def _cell(spread: Spread | None, form: str) -> str:
    if spread is None:
        return ""
    text = form.format(spread.median)
    return text if spread.least == spread.largest else f"{text} ({form.format(spread.least)}..{form.format(spread.largest)})"


def draw(results: Results, path: Path) -> None:
    """Write a picture of every system's step as a multiple of the baseline's, or in ms where that is missing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = results.models()
    rows = max(len(results.systems(model)) for model in models)
    figure = Figure(figsize=(5.5 * len(models), 1.4 + 0.45 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        baseline = results.of(model, BASELINE)
        bars: list[tuple[str, Spread]] = []
        for system in results.systems(model):
            runs = results.of(model, system)
            spread = ratios(runs, baseline) if baseline else Spread.of([m.step_ms for m in runs.values()])
            if spread is not None:
                bars.append((system if same_loss(runs, baseline) is not False else f"{system} *", spread))
        middles = [spread.median for _, spread in bars]
        errors = [[s.median - s.least for _, s in bars], [s.largest - s.median for _, s in bars]]
        colours = ["tab:orange" if name.startswith("ours") else "tab:blue" for name, _ in bars]
        axes.barh([name for name, _ in bars], middles, xerr=errors, color=colours, capsize=3)
        axes.invert_yaxis()
        axes.set(title=model, xlabel=f"time of a step, x {BASELINE}" if baseline else "ms/step")
        if baseline:
            axes.axvline(1.0, color="black", linewidth=0.8)
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle("step time; least and largest of repeats; * another loss than " + BASELINE)
    figure.savefig(path, dpi=120)


def write_results(results: Results, folder: Path) -> None:
    """Write what was measured so far to `folder`. OSError where that cannot be."""
    text = msgspec.json.format(msgspec.json.encode(results), indent=1)
    (folder / RESULTS_FILE).write_bytes(text)


def read_results(folder: Path) -> Results:
    """What `write_results` wrote. Raises UsageError where there is nothing to read."""
    path = folder / RESULTS_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Results)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    except msgspec.DecodeError as error:
        raise UsageError(f"{path} holds no results of a benchmark: {error}.") from None


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write the table and the plot to `folder` and return the files. OSError where that cannot be."""
    table, plot = folder / TABLE_FILE, folder / PLOT_FILE
    table.write_text(f"# Benchmarks\n\n{to_markdown(results)}", encoding="utf-8")
    draw(results, plot)
    return [table, plot]
