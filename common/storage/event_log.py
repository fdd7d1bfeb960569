"""The run's event log: one SQLite file that the coordinator writes and all others read.

Printing, reports, experiments and tests are its readers; there is no second way to report.

- `rounds`: one row per committed round: when, how many samples and micro-batches, what was dropped, mean metrics.
- `contributions`: one row per contribution a server filed, ignored or dropped, in the order of filing.
- `metrics`: values that scripts logged outside a micro-batch (evaluation); NULL if a value was not a number.
- `status`: one row per process, overwritten: what it does and which process it waits for.
- `events`: everything else worth telling, in order.
- `state`: the rest that a new coordinator needs to go on, in MessagePack; see `ps/coordinator/recovery.py`.
"""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roundtable.common.config.weights import Weighed
from roundtable.common.storage.atomic_files import rename

FILE_NAME = "events.sqlite"
#: Rows that are kept in memory while they cannot be written.
_MOST_ROWS = 200_000
#: Rows without which no run can go on. They are never left out.
_EVENT_LOG = ("INSERT OR IGNORE INTO rounds ", "INSERT INTO contributions ")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, kind TEXT NOT NULL, process TEXT NOT NULL, data TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS rounds (
    round INTEGER PRIMARY KEY, at REAL NOT NULL, epoch INTEGER NOT NULL, samples INTEGER NOT NULL,
    micro_batches INTEGER NOT NULL, dropped INTEGER NOT NULL, metrics TEXT NOT NULL, weight REAL);
CREATE TABLE IF NOT EXISTS contributions (
    seq INTEGER PRIMARY KEY, at REAL NOT NULL, round INTEGER NOT NULL, lo INTEGER NOT NULL, hi INTEGER NOT NULL,
    worker TEXT NOT NULL, samples INTEGER NOT NULL, outcome TEXT NOT NULL, staleness INTEGER,
    micro_batches INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS metrics (
    seq INTEGER PRIMARY KEY, at REAL NOT NULL, round INTEGER NOT NULL, worker TEXT NOT NULL,
    name TEXT NOT NULL, value REAL, incarnation INTEGER NOT NULL, number INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS status (
    process TEXT PRIMARY KEY, at REAL NOT NULL, state TEXT NOT NULL, round INTEGER NOT NULL,
    waits_for TEXT NOT NULL, samples_per_second REAL NOT NULL);
CREATE TABLE IF NOT EXISTS state (kind TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, PRIMARY KEY (kind, key));
"""


@dataclass(frozen=True)
class Event:
    """Something that happened once. `kind` is a short word such as 'joined', 'lost', 'failed'."""

    kind: str
    process: str
    data: dict[str, Any]


@dataclass(frozen=True)
class RoundRow(Weighed):
    """A committed round. `samples` excludes the dropped ones. `metrics` are means of weight `weight`. None: of its samples."""

    round: int
    epoch: int
    samples: int
    micro_batches: int
    dropped: int
    metrics: dict[str, float]
    weight: float | None = None
    at: float = 0.0


@dataclass(frozen=True)
class ContributionRow:
    """Micro-batches lo..hi-1 of `round`, sent by `worker`.

    `outcome` is committed, duplicate, dropped, late or dropped in part. Each micro-batch has one row that is committed or
    dropped. If it was dropped because no worker had sent it, the row has no worker. If a worker sends it afterwards, one more row
    says late. One more row says dropped in part if some servers applied a gradient of it and others dropped one. If pushes are
    applied at once, rows are in the order in which server 0 began to apply them.
    `staleness` counts updates between pull and push, if the policy lets it differ from 0. `micro_batches` is hi - lo. If workers
    step locally, it is not: then `lo` is a worker's number.
    """

    round: int
    lo: int
    hi: int
    worker: str
    samples: int
    outcome: str
    staleness: int | None = None
    micro_batches: int = 0


@dataclass(frozen=True)
class StatusRow:
    """The present state of a process. `state` is a word. `waits_for` names processes as `some` does, or is empty."""

    process: str
    state: str
    round: int
    waits_for: str
    samples_per_second: float = 0.0
    at: float = 0.0


def some(names: Sequence[str]) -> str:
    """Return names as people read them: 'a', 'a and b', or 'a, b and 3 more'."""
    if len(names) <= 2:
        return " and ".join(names)
    return f"{names[0]}, {names[1]} and {len(names) - 2} more"


def connect_to_write(path: Path) -> sqlite3.Connection:
    """Open the event log at `path` so that readers, now and later, do not block the writer.

    A reader in the midst of a transaction may hold on to a closed log. Then a copy takes the log's place, and the reader keeps
    the file that it has open. Raise sqlite3.Error for a file that is no log, and OSError if no copy can be made.
    """
    db = sqlite3.connect(path, isolation_level=None, timeout=1.0)
    try:
        db.execute("PRAGMA journal_mode=WAL")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
            db.close()
            raise
        copied = path.with_name(path.name + ".copy")
        copied.unlink(missing_ok=True)
        with contextlib.closing(db), contextlib.closing(sqlite3.connect(copied)) as copy:
            db.backup(copy)
        rename(copied, path)
        db = sqlite3.connect(path, isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA busy_timeout=5000")
    return db


def round_rows(db: sqlite3.Connection, after: int = -1) -> list[RoundRow]:
    """Return the rounds after one, in order. A log of an earlier release has no weights."""
    rows = db.execute("SELECT * FROM rounds WHERE round > ? ORDER BY round", (after,))
    return [
        RoundRow(round_, epoch, samples, micro_batches, dropped, json.loads(metrics), weight[0] if weight else None, at)
        for round_, at, epoch, samples, micro_batches, dropped, metrics, *weight in rows
    ]


class RunLog:
    """The writing end, one per run, in the coordinator. Rows are buffered until `flush`. After that they outlast a crash.

    The caller handles errors of the operating system or of SQLite in `flush`. Buffered rows are kept for the next try. If there
    are too many for memory, events and metrics are `lost`.
    """

    def __init__(self, path: Path) -> None:
        self._db = connect_to_write(path)
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)
        if "weight" not in {column[1] for column in self._db.execute("PRAGMA table_info(rounds)")}:
            self._db.execute("ALTER TABLE rounds ADD COLUMN weight REAL")  # a log of an earlier release
        self._pending: deque[tuple[str, tuple[Any, ...]]] = deque()
        #: Rows that overwrite others, by the key that they overwrite.
        self._newest: dict[tuple[Any, ...], tuple[str, tuple[Any, ...]]] = {}
        self.lost = 0

    def event(self, event: Event) -> None:
        self._add("INSERT INTO events VALUES (NULL,?,?,?,?)", event.kind, event.process, json.dumps(event.data))

    def round(self, row: RoundRow) -> None:
        self._keep(
            "INSERT OR IGNORE INTO rounds VALUES (?,?,?,?,?,?,?,?)",
            (row.round, time.time(), row.epoch, row.samples, row.micro_batches, row.dropped, json.dumps(row.metrics), row.weight),
        )

    def contribution(self, row: ContributionRow) -> None:
        self._add(
            "INSERT INTO contributions VALUES (NULL,?,?,?,?,?,?,?,?,?)",
            row.round, row.lo, row.hi, row.worker, row.samples, row.outcome, row.staleness, row.micro_batches,
        )  # fmt: skip

    def metric(self, round_: int, worker: str, name: str, value: float, incarnation: int = 0, number: int = 0) -> None:
        """Log one value. `number` tells apart the metrics of one incarnation of the worker."""
        self._add("INSERT INTO metrics VALUES (NULL,?,?,?,?,?,?,?)", round_, worker, name, value, incarnation, number)

    def state(self, kind: str, key: str, value: bytes) -> None:
        """Write a piece of state over the one of the same kind and key."""
        self._newest["state", kind, key] = "INSERT OR REPLACE INTO state VALUES (?,?,?)", (kind, key, value)

    def status(self, row: StatusRow) -> None:
        self._newest["status", row.process] = (
            "INSERT OR REPLACE INTO status VALUES (?,?,?,?,?,?)",
            (row.process, time.time(), row.state, row.round, row.waits_for, row.samples_per_second),
        )

    def _add(self, statement: str, *values: Any) -> None:
        self._keep(statement, (time.time(), *values))

    def _keep(self, statement: str, values: tuple[Any, ...]) -> None:
        if len(self._pending) >= _MOST_ROWS and not statement.startswith(_EVENT_LOG):
            self.lost += 1
        else:
            self._pending.append((statement, values))

    def flush(self) -> None:
        """Write what is buffered, in one transaction."""
        if not self._pending and not self._newest:
            return
        try:
            self._db.execute("BEGIN")
            by_statement: dict[str, list[tuple[Any, ...]]] = {}
            for statement, values in [*self._pending, *self._newest.values()]:
                by_statement.setdefault(statement, []).append(values)
            for statement, rows in by_statement.items():
                self._db.executemany(statement, rows)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # SQLite may have rolled back by itself
                self._db.execute("ROLLBACK")
            raise
        self._pending.clear()
        self._newest.clear()

    def close(self) -> None:
        """Flush and close. The log is closed even if `flush` raises."""
        try:
            self.flush()
        finally:
            self._close()

    def _close(self) -> None:
        with contextlib.suppress(sqlite3.OperationalError):  # if a program is reading, the side files stay until it ends
            self._db.execute("PRAGMA journal_mode=DELETE")
        self._db.close()


class RunLogReader:
    """The reading end, safe to use while the run goes on. Every method reads afresh."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5.0, isolation_level=None)

    def rounds(self, after: int = -1) -> list[RoundRow]:
        return round_rows(self._db, after)

    def count_rounds(self) -> int:
        count: int = self._db.execute("SELECT count(*) FROM rounds").fetchone()[0]
        return count

    def contributions(self) -> list[ContributionRow]:
        query = "SELECT round, lo, hi, worker, samples, outcome, staleness, micro_batches FROM contributions ORDER BY seq"
        return [ContributionRow(*row) for row in self._db.execute(query)]

    def committed_samples(self, after: int, since: float) -> list[tuple[int, float, str, int]]:
        """Return (sequence number, unix seconds, worker, samples) of contributions committed after a number and a time."""
        query = "SELECT seq, at, worker, samples FROM contributions WHERE seq > ? AND at >= ? AND outcome = 'committed'"
        return list(self._db.execute(f"{query} ORDER BY seq", (after, since)))

    def metrics(self, name: str) -> list[tuple[float, int, str, float]]:
        """Return (unix seconds, round, worker, value) of each time that a script logged `name`."""
        query = "SELECT at, round, worker, value FROM metrics WHERE name = ? ORDER BY seq"
        rows = self._db.execute(query, (name,))
        return [(at, round_, worker, math.nan if value is None else value) for at, round_, worker, value in rows]

    def newest_metric(self, name: str) -> float | None:
        """Return the value that a script last logged as `name`, or None."""
        row = self._db.execute("SELECT value FROM metrics WHERE name = ? ORDER BY seq DESC LIMIT 1", (name,)).fetchone()
        return None if row is None else math.nan if row[0] is None else float(row[0])

    def statuses(self) -> list[StatusRow]:
        rows: Iterable[tuple[Any, ...]] = self._db.execute("SELECT * FROM status ORDER BY process")
        return [StatusRow(p, state, r, waits, speed, at) for p, at, state, r, waits, speed in rows]

    def events(self, after: int = 0) -> list[tuple[int, float, Event]]:
        """Return (sequence number, unix seconds, event), oldest first."""
        rows = self._db.execute("SELECT * FROM events WHERE seq > ? ORDER BY seq", (after,))
        return [(seq, at, Event(kind, process, json.loads(data))) for seq, at, kind, process, data in rows]

    def close(self) -> None:
        self._db.close()
