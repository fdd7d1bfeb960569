"""Write the results of the benchmarks: all as JSON, and from it a Markdown table and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.compare.measure import Measurement
from roundtable.common.runtime.errors import UsageError

RESULTS_FILE = "results.json"
TABLE_FILE = "results.md"
PLOT_FILE = "results.png"

#: The systems that others are compared with.
BASELINE, BOUND, OTHER = "ddp", "independent", "rpc"
#: Losses are equal to rounding if they differ by less than this part of the change by training.
ROUNDING = 1e-2


#: A network and a model. Systems are compared within one setting.
Setting = tuple[str, str]


class Result(msgspec.Struct, frozen=True):
    """One run. If it failed or was refused, `measured` is None, and `error` says why."""

    network: str
    model: str
    system: str
    repeat: int
    measured: Measurement | None
    error: str = ""
    refused: bool = False

    @property
    def setting(self) -> Setting:
        return self.network, self.model


class Results(msgspec.Struct, frozen=True):
    """All runs, and a description of the measurement and the machine."""

    about: dict[str, str]
    runs: list[Result]

    def settings(self) -> list[Setting]:
        return list(dict.fromkeys(run.setting for run in self.runs))

    def systems(self, setting: Setting) -> list[str]:
        return list(dict.fromkeys(run.system for run in self.runs if run.setting == setting))

    def of(self, setting: Setting, system: str) -> dict[int, Measurement]:
        """Return the successful runs of one system, by repeat."""
        runs = (run for run in self.runs if (run.setting, run.system) == (setting, system))
        return {run.repeat: run.measured for run in runs if run.measured is not None}

    def refusal(self, setting: Setting, system: str) -> str:
        """Return why a system does not train this, or ''."""
        runs = (run for run in self.runs if (run.setting, run.system) == (setting, system))
        return next((run.error for run in runs if run.refused), "")


@dataclass(frozen=True)
class Spread:
    """The median of some values, the least and the largest of them."""

    median: float
    least: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Return the spread of some values, or None for no values."""
        return cls(statistics.median(values), min(values), max(values)) if values else None


def ratios(
    of: dict[int, Measurement], to: dict[int, Measurement], value: Callable[[Measurement], float] = lambda m: m.step_ms
) -> Spread | None:
    """Return `value` of one system as a multiple of another's, by repeat: runs that followed each other are compared.

    None if they have no repeat in common.
    """
    return Spread.of([value(of[repeat]) / value(to[repeat]) for repeat in of if repeat in to])


def same_loss(of: dict[int, Measurement], to: dict[int, Measurement]) -> bool | None:
    """Return whether the loss of every worker in every run equals that of another system, to rounding. None without such runs.

    The mean over workers would not do: for workers that never talk it is nearly the same after a few steps. The difference counts
    relative to how far the loss has moved: a loss that has hardly moved is nearly the same whatever went wrong.
    """
    if not of or not to:
        return None
    right = statistics.median(m.loss for m in to.values())
    moved = statistics.median(abs(m.loss - m.loss_before) for m in to.values())
    return all(abs(loss - right) <= ROUNDING * moved for m in of.values() for loss in m.losses)


_HEADER = (
    "network", "model", "system", "ms/step", f"x {BASELINE}", f"x {BOUND}", f"x {OTHER}", "CPU s/step", f"CPU x {BASELINE}",
    "memory MB", f"memory x {BASELINE}", "wire MB/step", "codec ms/step", "loss", f"as {BASELINE}", "others",
)  # fmt: skip


def to_markdown(results: Results) -> str:
    """Return the table, and an explanation below it."""
    cells: list[Sequence[str]] = [_HEADER]
    for setting in results.settings():
        for system in results.systems(setting):
            cells.append([*setting, system, *_row(results, setting, system)])
    about = [f"- {key}: {value}" for key, value in results.about.items()]
    failed = [run for run in results.runs if run.error and not run.refused]
    about += [f"- {run.network} {run.model} {run.system}, repeat {run.repeat + 1}, failed: {run.error}" for run in failed]
    return "\n".join([markdown_table(cells, left=3), "", *about, "", _LEGEND])


def _row(results: Results, setting: Setting, system: str) -> list[str]:
    runs = results.of(setting, system)
    if not runs:
        why = results.refusal(setting, system)
        return [f"refused: {why}" if why else "failed"]
    everything = list(runs.values())
    baseline, bound, other = (results.of(setting, name) for name in (BASELINE, BOUND, OTHER))
    same = same_loss(runs, baseline)
    wires = [m.wire for m in everything if m.wire is not None]
    return [
        _cell(Spread.of([m.step_ms for m in everything]), "{:.1f}"),
        _cell(ratios(runs, baseline), "{:.2f}"),
        _cell(ratios(runs, bound), "{:.2f}"),
        _cell(ratios(runs, other), "{:.2f}"),
        f"{statistics.median(m.cpu_s for m in everything):.3f}",
        _cell(ratios(runs, baseline, lambda m: m.cpu_s), "{:.2f}"),
        f"{statistics.median(m.memory_mb for m in everything):.0f}",
        _cell(ratios(runs, baseline, lambda m: m.memory_mb), "{:.2f}"),
        f"{statistics.median(wire.megabytes for wire in wires):.2f}" if wires else "",
        " + ".join(f"{statistics.median(s) * 1e3:.1f}" for s in zip(*((w.encode_s, w.decode_s) for w in wires), strict=True)),
        f"{statistics.median(m.loss for m in everything):.5f}",
        "" if same is None else "yes" if same else "**no**",
        f"{statistics.median(m.others for m in everything):.1f}",
    ]


def markdown_table(cells: Sequence[Sequence[str]], left: int) -> str:
    """Return a Markdown table. The first row is the header, and the first `left` columns hold words, not numbers.

    A row that is shorter than the header ends in a text that need not fit its column.
    """
    cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    columns = len(cells[0])
    widths = [max(len(row[i]) for row in cells if len(row) == columns or i < len(row) - 1) for i in range(columns)]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    padded = [
        [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=len(row) == columns))]
        for row in [cells[0], rule, *cells[1:]]
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


_LEGEND = f"""\
- ms/step: mean of worker 0's timed steps, then the median of the repeats (least..largest); ratios are taken repeat by repeat
- wire: tensors that workers have sent and received in frames; codec: to encode + to decode, of all processes; both over all steps
- CPU: user and system time of all the system's processes in the timed steps; memory: peak sum of their proportional set sizes
- loss: of the last global batch after the last step, mean over workers; as {BASELINE}: each within {ROUNDING:g} of its change
- others: processors that were busy with something else during the timed steps; if there are many, the times are disturbed
"""


def _cell(spread: Spread | None, form: str) -> str:
    if spread is None:
        return ""
    text = form.format(spread.median)
    return text if spread.least == spread.largest else f"{text} ({form.format(spread.least)}..{form.format(spread.largest)})"


def draw(results: Results, path: Path) -> None:
    """Write a picture of every system's step as a multiple of the baseline's, or in ms if the baseline is missing.

    It has a row for each network and a column for each model.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = results.settings()
    networks, models = (list(dict.fromkeys(names)) for names in zip(*settings, strict=True))
    rows = max(len(results.systems(setting)) for setting in settings)
    figure = Figure(figsize=(5.5 * len(models), (1.4 + 0.45 * rows) * len(networks)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(networks), len(models), squeeze=False)
    for setting in ((network, model) for network in networks for model in models):
        axes = grid[networks.index(setting[0])][models.index(setting[1])]
        baseline = results.of(setting, BASELINE)
        bars: list[tuple[str, Spread]] = []
        for system in results.systems(setting):
            runs = results.of(setting, system)
            spread = ratios(runs, baseline) if baseline else Spread.of([m.step_ms for m in runs.values()])
            if spread is not None:
                bars.append((system if same_loss(runs, baseline) is not False else f"{system} *", spread))
        middles = [spread.median for _, spread in bars]
        errors = [[s.median - s.least for _, s in bars], [s.largest - s.median for _, s in bars]]
        colours = ["tab:orange" if name.startswith("ours") else "tab:blue" for name, _ in bars]
        axes.barh([name for name, _ in bars], middles, xerr=errors, color=colours, capsize=3)
        axes.invert_yaxis()
        axes.set(title=", ".join(reversed(setting)), xlabel=f"time of a step, x {BASELINE}" if baseline else "ms/step")
        if baseline:
            axes.axvline(1.0, color="black", linewidth=0.8)
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle("step time; least and largest of repeats; * another loss than " + BASELINE)
    figure.savefig(path, dpi=120)


def write_results(results: Results, folder: Path) -> None:
    """Write the results so far to `folder`. Raises OSError if the file cannot be written."""
    text = msgspec.json.format(msgspec.json.encode(results), indent=1)
    (folder / RESULTS_FILE).write_bytes(text)


def read_results(folder: Path) -> Results:
    """Return what `write_results` wrote. Raise UsageError if there is nothing to read."""
    path = folder / RESULTS_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Results)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    except msgspec.DecodeError as error:
        raise UsageError(f"{path} holds no results of a benchmark: {error}.") from None


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write the table and the plot to `folder` and return the files. Raises OSError if a file cannot be written."""
    table, plot = folder / TABLE_FILE, folder / PLOT_FILE
    table.write_text(f"# Benchmarks\n\n{to_markdown(results)}", encoding="utf-8")
    draw(results, plot)
    return [table, plot]
