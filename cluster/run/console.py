"""What the user sees of a run: live on a terminal, a plain line now and then elsewhere, and a summary at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from roundtable.cluster.run.progress import Progress, Tracker
from roundtable.common.runtime.errors import printable
from roundtable.common.storage.disk_alarm import Alarm
from roundtable.common.storage.event_log import some
from roundtable.common.storage.run_files import MODEL_FILE

_LIVE_S = 0.5
_PLAIN_S = 5.0
_SHORT_SHA = 12


class Screen:
    """Shows a run's progress; a context, at whose end the terminal is as before. Call `update` as often as you like."""

    def __init__(self, console: Console, log: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """`log` is the run's event log; it need not exist yet."""
        self._console = console
        self._tracker = Tracker(log)
        self._clock = clock
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._every_s = _LIVE_S if self._live else _PLAIN_S
        self._looked_at = float("-inf")
        self._told_at = clock()
        self.progress = Progress()
        #: What the coordinator has to say that it cannot write to the log.
        self.alarm = Alarm()

    def __enter__(self) -> Screen:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()
        self.alarm.close()

    def say(self, line: str) -> None:
        """Print a line, above the live part if there is one."""
        say(self._console, line)

    def update(self) -> None:
        """Look at the run and show it, if the last time is long enough ago."""
        now = self._clock()
        if now < self._looked_at + _LIVE_S:
            return
        self._looked_at = now
        before, self.progress = self.progress.alarm, replace(self._tracker.look(), alarm=self.alarm.text)
        for news in self.progress.news:
            self.say(news)
        if self.progress.alarm and not before:
            self.say(f"warning: {self.progress.alarm}")
        if self._live:
            self._live.update(picture(self.progress), refresh=True)
        elif now >= self._told_at + self._every_s:
            self._told_at = now
            self.say(line(self.progress))


class LiveOnly(Screen):
    """For a run that is only a means to something else: its progress on a terminal, and no lines about it."""

    def say(self, line: str) -> None:
        pass


def say(console: Console, line: str) -> None:
    """Print a line as it is, but for what would be more than letters on a terminal."""
    console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def line(progress: Progress) -> str:
    """Progress in one line without control characters."""
    waiting: dict[str, list[str]] = {}
    for row in progress.processes:
        if row.waits_for:
            waiting.setdefault(row.waits_for, []).append(row.process)
    waits = [f"{some(who)} {'waits' if len(who) == 1 else 'wait'} for {whom}" for whom, who in waiting.items()]
    alarm = [f"warning: {progress.alarm}"] if progress.alarm else []
    return "; ".join([", ".join([_rounds(progress), *_numbers(progress)]), *waits, *alarm])


def picture(progress: Progress) -> Group:
    """Progress as a bar, a line of numbers, a line for each process, and the alarm, if there is one."""
    head = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=progress.total or 1, completed=progress.rounds if progress.total else 0, width=32)
    head.add_row(bar, Text(_rounds(progress)))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("process", "state", "round", "samples/s", "waits for"):
        table.add_column(title, justify="right" if title in ("round", "samples/s") else "left")
    for row in progress.processes:
        speed = f"{row.samples_per_second:.0f}" if row.samples_per_second else ""
        table.add_row(Text(row.process), Text(row.state), str(row.round) if row.round >= 0 else "", speed, Text(row.waits_for))
    alarm = [Text(f"warning: {progress.alarm}", style="bold red")] if progress.alarm else []
    return Group(head, Text("  ".join(_numbers(progress))), table, *alarm)


def results_line(summary: Mapping[str, Any]) -> str:
    """What came out of a run, in one line."""
    if not summary["rounds"] and "weights_sha256" in summary and summary["weights_sha256"] is None:
        return "no model was trained"
    results = []
    if summary.get("accuracy") is not None:
        results.append(f"accuracy {summary['accuracy']:.1%}{_of(summary.get('accuracy_of'))}")
    if summary.get("loss") is not None:
        results.append(f"loss {summary['loss']:.4f}{_of(summary.get('loss_of'))}")
    rounds = _count(summary["rounds"], "round")
    if summary.get("merges") is not None:
        rounds += f" in {_count(summary['merges'], 'merge')}"
    before = summary.get("samples_before_resume", 0)
    since = f", {summary['samples'] - before} of them since it went on," if before else ""
    amounts = f"{rounds}, {summary['samples']} samples{since} in {summary['seconds']:.1f} s"
    if summary.get("samples_per_second") is not None:
        amounts += f" ({summary['samples_per_second']:.0f} samples/s)"
    return ", ".join([*results, amounts])


def summary_lines(summary: Mapping[str, Any], folder: Path) -> list[str]:
    """The end of a run in a few lines: what came out, and where it is."""
    lines = [f"done: {results_line(summary)}"]
    extra = {"micro_batches_recomputed": "computed twice", "dropped": "dropped"}
    told = [f"{n} micro-batch{'es' * (n > 1)} {text}" for key, text in extra.items() if (n := summary.get(key))]
    if told:
        lines.append(", ".join(told))
    if failed := summary.get("workers_failed"):
        lines.append(f"went on without {some(failed)}")
    for name, round_ in summary.get("left_early", {}).items():
        lines.append(f"{name} left after round {round_}, as its script ended; others did what it had not done")
    for name, why in summary.get("failed_after_the_last_round", {}).items():
        lines.append(f"{name} failed after the last round, which changes nothing of the model: {why}")
    if summary.get("weights_sha256"):
        lines.append(f"weights_sha256 {summary['weights_sha256'][:_SHORT_SHA]}")
    if (folder / MODEL_FILE).exists():
        lines.append(f"the model is in {folder / MODEL_FILE}")
    return lines


def _of(what: str | None) -> str:
    return f" ({what})" if what else ""


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _rounds(progress: Progress) -> str:
    what = "merge" if progress.merges else "round"
    if progress.total is not None:
        return f"{what} {progress.rounds}/{progress.total}"
    if progress.rounds:
        return f"{what} {progress.rounds}"
    there = len(progress.processes)
    doing = "at work" if any(row.state == "computing" for row in progress.processes) else "starting"
    return f"{doing}, {there} {'process has' if there == 1 else 'processes have'} joined"


def _numbers(progress: Progress) -> list[str]:
    parts = []
    if progress.rounds:
        parts.append(f"{progress.samples_per_second:.0f} samples/s")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.accuracy is not None:
        parts.append(f"accuracy {progress.accuracy:.1%}")
    return parts
