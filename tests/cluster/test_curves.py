"""The course of a run over time: seconds in which it trained, without the pause before somebody went on with it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from roundtable.cluster.commands.report import read_curve
from roundtable.common.storage.event_log import FILE_NAME, Event, RoundRow, RunLog


def run_with(folder: Path, *happened: tuple[float, str]) -> Path:
    """An event log in which this happened when, 'round' among it."""
    path = folder / FILE_NAME
    log = RunLog(path)
    rounds = [at for at, what in happened if what == "round"]
    events = [(at, what) for at, what in happened if what != "round"]
    for number in range(len(rounds)):
        log.round(RoundRow(number, 0, 8, 2, 0, {"loss": 1.0}))
    for _, what in events:
        log.event(Event(what, "coordinator", {}))
    log.close()
    with closing(sqlite3.connect(path)) as db, db:
        db.executemany("UPDATE rounds SET at = ? WHERE round = ?", [(at, number) for number, at in enumerate(rounds)])
        db.executemany("UPDATE events SET at = ? WHERE seq = ?", [(at, number) for number, (at, _) in enumerate(events, 1)])
    return path


BEGINS = [(100.0, "started"), (101.0, "plan"), (102.0, "round"), (103.0, "round")]


@pytest.mark.parametrize("end", [[], [(103.5, "stopped")]])
def test_a_pause_of_a_day_before_somebody_goes_on_does_not_count(tmp_path: Path, end: list[tuple[float, str]]) -> None:
    later = [(90000.0, "rolled back"), (90001.0, "started"), (90010.0, "plan"), (90012.0, "round")]
    curve = read_curve("run", run_with(tmp_path, *BEGINS, *end, *later))
    seconds = 2.0 + 2.0 + (0.5 if end else 0.0)
    assert [at for at, _ in curve.loss] == pytest.approx([1.0, 2.0, seconds])


def test_seconds_in_which_all_begin_anew_by_themselves_count(tmp_path: Path) -> None:
    later = [
        (104.0, "restarted"),
        (104.1, "stopped"),
        (106.0, "rolled back"),
        (106.5, "started"),
        (108.0, "plan"),
        (109.0, "round"),
    ]
    curve = read_curve("run", run_with(tmp_path, *BEGINS, *later))
    assert [at for at, _ in curve.loss] == pytest.approx([1.0, 2.0, 8.0])
