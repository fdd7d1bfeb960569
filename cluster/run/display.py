"""Progress as text: a picture for a terminal of at least 80 columns, and a plain line for other outputs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from roundtable.cluster.run.progress import Progress
from roundtable.common.storage.event_log import StatusRow, some

#: Seconds of waiting before it is shown: most waiting is over at once.
_WAITS_S = 2.0
_BAR = 36
_SHORT_BAR = 20
#: Lines of the picture that are not of workers.
_OTHER_LINES = 5
#: With so many workers or more, those that are well share one line.
_MANY = 5
_NOT_HERE = ("lost", "done")


def line(progress: Progress, elapsed_s: float | None = None) -> str:
    """Return progress in one line without control characters."""
    waiting: dict[str, list[str]] = {}
    for row in _workers(progress):
        if _waits(row, progress):
            waiting.setdefault(row.waits_for, []).append(row.process)
    waits = [f"{some(who)} {'waits' if len(who) == 1 else 'wait'} for {whom}" for whom, who in waiting.items()]
    alarm = [f"warning: {progress.alarm}"] if progress.alarm else []
    return "; ".join([", ".join([*_rounds(progress), *_numbers(progress, elapsed_s)]), *waits, *alarm])


def picture(progress: Progress, elapsed_s: float | None = None, height: int = 24) -> Group:
    """Return progress as a bar, a line of numbers, lines for workers, one for servers, and the alarm, if there is one."""
    share = progress.rounds / progress.total if progress.total else 0.0
    percent = f"{share:4.0%} " if progress.total else "   - "
    numbers = "   ".join(_numbers(progress, elapsed_s))
    lines = [
        f"{percent}|{_bar(share, _BAR, ' ')}| {'  '.join(_rounds(progress))}",
        *([f" {numbers}"] if numbers else []),
        *_of_workers(progress, max(2, height - _OTHER_LINES)),
        *_of_servers(progress),
    ]
    alarm = [Text(f"warning: {progress.alarm}", style="bold red")] if progress.alarm else []
    return Group(*(Text(one, no_wrap=True, overflow="ellipsis") for one in lines), *alarm)


def clock(seconds: float) -> str:
    """Return 0:07, 12:30 or 3:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _rounds(progress: Progress) -> list[str]:
    what = "merge" if progress.merges else "round"
    if progress.total is None and not progress.rounds:
        there = len(progress.processes)
        doing = "at work" if any(row.state == "computing" for row in progress.processes) else "starting"
        return [f"{doing}, {there} {'process' if there == 1 else 'processes'} connected"]
    rounds = f"{what} {progress.rounds:,}" + (f"/{progress.total:,}" if progress.total is not None else "")
    epochs = [f"epoch {min(progress.epoch, progress.epochs)}/{progress.epochs}"] if progress.epoch and progress.epochs else []
    return [rounds, *epochs]


def _numbers(progress: Progress, elapsed_s: float | None) -> list[str]:
    parts = []
    if progress.rounds:
        parts.append(f"{progress.samples_per_second:,.0f} samples/s")
    if elapsed_s is not None:
        parts.append(f"elapsed {clock(elapsed_s)}")
    if progress.left_s is not None:
        parts.append(f"left {clock(progress.left_s)}")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.accuracy is not None:
        parts.append(f"accuracy {progress.accuracy:.1%}")
    return parts


def _workers(progress: Progress) -> list[StatusRow]:
    return [row for row in progress.processes if row.process.startswith("worker") and row.state not in _NOT_HERE]


def _waits(row: StatusRow, progress: Progress) -> bool:
    return bool(row.waits_for) and progress.waits_s.get(row.process, 0.0) >= _WAITS_S


def _of_workers(progress: Progress, most: int) -> list[str]:
    """Return a line for each worker if there are few. Else return one line for all that are well, and one for each other."""
    rows = _workers(progress)
    if len(rows) < _MANY and len(rows) <= most:
        return [_row(row, progress) for row in rows]
    odd = [row for row in rows if row.state == "starting" or _waits(row, progress)]
    well = [row for row in rows if row not in odd]
    lines = [*([_well(well, progress)] if well else []), *(_row(row, progress) for row in odd)]
    return lines if len(lines) <= most else [*lines[: most - 1], f" and {len(lines) - most + 1} more that start or wait"]


def _well(rows: Sequence[StatusRow], progress: Progress) -> str:
    speeds = {row.process: progress.speeds.get(row.process, 0.0) for row in rows}
    text = f" {len(rows)} workers ok"
    if len(speeds) > 1 and any(speeds.values()):
        slowest = min(speeds, key=speeds.__getitem__)
        why = next((f", waits for {row.waits_for}" for row in rows if row.process == slowest and row.waits_for), "")
        text += f"   median {statistics.median(speeds.values()):,.0f}/s   slowest {slowest} {speeds[slowest]:,.0f}/s{why}"
    return text


def _row(row: StatusRow, progress: Progress) -> str:
    name = f" {row.process:<10}"
    if _waits(row, progress):
        return f"{name} waiting {progress.waits_s[row.process]:.0f} s for {row.waits_for}"
    if row.process not in progress.speeds or not progress.samples_per_second:
        return f"{name} {row.state}"
    speed = progress.speeds[row.process]
    share = speed / progress.samples_per_second
    return f"{name} {row.state:<10} {_bar(share, _SHORT_BAR, '.')} {speed:>8,.0f}/s {share:>4.0%} of the work"


def _of_servers(progress: Progress) -> list[str]:
    rows = [row for row in progress.processes if row.process.startswith("server")]
    if not rows:
        return []
    odd = [f"{row.process} {row.state}" for row in rows if row.state in ("starting", "lost")]
    text = f" servers    {len(rows) - len(odd)} ok" + "".join(f", {one}" for one in odd[:3])
    if progress.checkpoint is not None:
        text += f"   checkpoint of round {progress.checkpoint[0]:,}, {progress.checkpoint[1]:.0f} s ago"
    return [text]


def _bar(share: float, width: int, empty: str) -> str:
    full = round(max(0.0, min(1.0, share)) * width)
    return "#" * full + empty * (width - full)
