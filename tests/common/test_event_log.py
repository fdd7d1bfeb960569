"""The event log: what is written is what is read, while the run goes on; nothing is lost where writing fails."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sqlite3
from pathlib import Path

import pytest

from roundtable.common.storage.event_log import FILE_NAME, ContributionRow, Event, RoundRow, RunLog, RunLogReader, StatusRow


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.sqlite"


def test_everything_that_is_written_is_read_back(path: Path) -> None:
    log = RunLog(path)
    reader = RunLogReader(path)
    events = [Event("joined", "worker-0", {"host": "h", "pid": 3}), Event("reassigned", "worker-1", {"round": 2, "k": [1]})]
    rounds = [RoundRow(0, 0, 64, 4, 0, {"loss": 1.5}), RoundRow(1, 0, 48, 3, 1, {})]
    contributions = [
        ContributionRow(0, 0, 4, "worker-0", 64, "committed"),
        ContributionRow(1, 2, 3, "worker-1", 16, "duplicate", 3),
    ]
    for event in events:
        log.event(event)
    for row in rounds:
        log.round(row)
    for contribution in contributions:
        log.contribution(contribution)
    log.metric(7, "worker-0", "accuracy", 0.5)
    log.metric(8, "worker-0", "loss", 2.0)
    log.flush()
    assert [(seq, event) for seq, _, event in reader.events()] == [(1, events[0]), (2, events[1])]
    assert [event for _, _, event in reader.events(after=1)] == events[1:]
    found = reader.rounds()
    assert [dataclasses.replace(row, at=0.0) for row in found] == rounds and all(row.at > 0 for row in found)
    assert [row.round for row in reader.rounds(after=0)] == [1]
    assert reader.contributions() == contributions
    assert [row[1:] for row in reader.metrics("accuracy")] == [(7, "worker-0", 0.5)]
    assert (reader.newest_metric("loss"), reader.newest_metric("none")) == (2.0, None)


def test_a_log_of_an_earlier_release_gets_weights_and_can_be_read_without(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as old:
        columns = "at REAL, epoch INTEGER, samples INTEGER, micro_batches INTEGER, dropped INTEGER, metrics TEXT"
        old.execute(f"CREATE TABLE rounds (round INTEGER PRIMARY KEY, {columns})")
        old.execute("INSERT INTO rounds VALUES (0, 1.0, 0, 64, 4, 0, '{}')")
    reader = RunLogReader(path)
    assert [(row.weight, row.total_weight) for row in reader.rounds()] == [(None, 64)]
    log = RunLog(path)
    log.round(RoundRow(1, 0, 64, 4, 0, {"loss": 1.0}, 0.5))
    log.flush()
    assert [(row.weight, row.total_weight) for row in reader.rounds()] == [(None, 64), (0.5, 0.5)]


def test_nothing_is_visible_before_flush_and_a_reader_sees_each_flush(path: Path) -> None:
    log = RunLog(path)
    reader = RunLogReader(path)
    for number in range(3):
        log.event(Event("warning", "coordinator", {"n": number}))
        assert len(reader.events()) == number
        log.flush()
        assert [event.data["n"] for _, _, event in reader.events()] == list(range(number + 1))


def test_a_round_is_recorded_once_and_a_status_is_overwritten(path: Path) -> None:
    log = RunLog(path)
    log.round(RoundRow(0, 0, 64, 4, 0, {}))
    log.round(RoundRow(0, 0, 1, 1, 0, {}))
    log.status(StatusRow("worker-1", "computing", 3, ""))
    log.status(StatusRow("worker-0", "waiting", 3, "worker-1", 10.0))
    log.status(StatusRow("worker-1", "waiting", 4, "worker-0", 20.0))
    log.flush()
    reader = RunLogReader(path)
    assert [row.samples for row in reader.rounds()] == [64]
    rows = [dataclasses.replace(row, at=0.0) for row in reader.statuses()]
    assert rows == [StatusRow("worker-0", "waiting", 3, "worker-1", 10.0), StatusRow("worker-1", "waiting", 4, "worker-0", 20.0)]


def test_what_could_not_be_written_is_kept_for_the_next_try(path: Path) -> None:
    log = RunLog(path)
    log.event(Event("started", "coordinator", {}))
    log.metric(0, "worker-0", "loss", 1.0)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("ALTER TABLE metrics RENAME TO gone")  # stands for any error in the middle of a flush
    with pytest.raises(sqlite3.OperationalError):
        log.flush()
    reader = RunLogReader(path)
    assert reader.events() == []  # all or nothing
    other.execute("ALTER TABLE gone RENAME TO metrics")
    log.event(Event("finished", "coordinator", {}))
    log.flush()
    assert [event.kind for _, _, event in reader.events()] == ["started", "finished"]
    assert len(reader.metrics("loss")) == 1
    log.flush()
    assert len(reader.events()) == 2


def test_a_lock_that_is_held_by_another_loses_nothing(path: Path) -> None:
    log = RunLog(path)
    log._db.execute("PRAGMA busy_timeout=1")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    log.event(Event("started", "coordinator", {}))
    with pytest.raises(sqlite3.OperationalError):
        log.flush()
    other.execute("ROLLBACK")
    log.flush()
    assert len(RunLogReader(path).events()) == 1


def test_a_closed_log_is_one_file_that_holds_everything(path: Path) -> None:
    log = RunLog(path)
    log.event(Event("started", "coordinator", {}))
    log.close()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert len(RunLogReader(path).events()) == 1


def test_a_value_that_is_no_number_is_kept_as_such_and_stops_no_other_row(path: Path) -> None:
    log = RunLog(path)
    log.metric(1, "worker-0", "accuracy", math.nan)
    log.round(RoundRow(0, 0, 4, 1, 0, {"loss": math.nan}))
    log.close()
    reader = RunLogReader(path)
    assert math.isnan(reader.metrics("accuracy")[0][3]) and math.isnan(reader.rounds()[0].metrics["loss"])


def test_a_log_that_somebody_reads_can_be_closed(path: Path) -> None:
    log = RunLog(path)
    reader = RunLogReader(path)
    assert reader.events() == []
    log.event(Event("started", "coordinator", {}))
    log.close()
    assert len(reader.events()) == 1


def test_a_reader_in_the_midst_of_a_transaction_keeps_nobody_from_going_on(path: Path) -> None:
    log = RunLog(path)
    log.event(Event("started", "coordinator", {}))
    log.close()
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM events").fetchone() == (1,)
    log = RunLog(path)
    log.event(Event("joined", "worker-0", {}))
    log.close()
    assert [event.kind for _, _, event in RunLogReader(path).events()] == ["started", "joined"]
    assert reader.execute("SELECT count(*) FROM events").fetchone() == (1,)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_reader_cannot_write(path: Path) -> None:
    RunLog(path).close()
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        RunLogReader(path)._db.execute("DELETE FROM events")


def test_on_a_full_disk_rows_are_kept_and_written_when_there_is_room(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roundtable.common.storage.event_log._MOST_ROWS", 5000)
    log = RunLog(path)
    log.event(Event("joined", "worker-0", {}))
    log.flush()
    pages = log._db.execute("PRAGMA page_count").fetchone()[0]
    log._db.execute(f"PRAGMA max_page_count={pages + 2}")  # as a full disk does, SQLite says "database or disk is full"
    for number in range(4000):
        log.event(Event("reassigned", "worker-0", {"n": number, "why": "x" * 50}))
        log.status(StatusRow("worker-0", "computing", number, "", 1.0))
    for _ in range(3):
        with pytest.raises(sqlite3.Error):
            log.flush()
    log._db.execute("PRAGMA max_page_count=1000000")
    log.flush()
    reader = RunLogReader(path)
    assert [event.data.get("n") for _, _, event in reader.events()] == [None, *range(4000)]
    assert [row.round for row in reader.statuses()] == [3999]
    assert log.lost == 0
    for number in range(6000):
        log.event(Event("reassigned", "worker-0", {"n": number}))
    for number in range(10):  # without which there is no going on
        log.round(RoundRow(number, 0, 8, 4, 0, {}))
        log.contribution(ContributionRow(number, 0, 4, "worker-0", 8, "committed", None, 4))
    assert log.lost == 1000
    log.close()
    assert [event.data.get("n") for _, _, event in reader.events()][-5000:] == list(range(5000))
    assert [row.round for row in reader.rounds()] == [row.round for row in reader.contributions()] == list(range(10))


def test_the_name_of_a_folder_is_a_name_and_no_address_with_options(tmp_path: Path) -> None:
    for name in ("x?mode=rwc&y=", "a#b", "50%", "plain"):
        folder = tmp_path / name
        folder.mkdir()
        RunLog(folder / FILE_NAME).close()
        reader = RunLogReader(folder / FILE_NAME)
        assert reader.rounds() == []
        reader.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["x?mode=rwc&y=", "a#b", "50%", "plain"])
