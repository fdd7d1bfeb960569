"""Restores a run from its event log when its coordinator starts again.

The event log (`common/storage/event_log.py`) has rounds, contributions and metrics as rows, and everything else as `state`. The
coordinator writes every promise (an acknowledged report, a name, a plan) to the log before it sends the promise. Some state is
not in the log, because servers and workers send it again: their addresses, what they wait for, and decisions on the open round
(`ps/coordinator/state/decisions.py`).
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from roundtable.common.config.batch_plan import Segment
from roundtable.common.config.settings import Settings
from roundtable.common.config.work_shares import ShareTable
from roundtable.common.config.worker_facts import FirstFacts
from roundtable.common.policies import load
from roundtable.common.protocol.messages.commit import Committed, Contribution
from roundtable.common.protocol.messages.session import CollectiveOutcome, Hello, Stop
from roundtable.common.protocol.messages.setup import Setup
from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage.event_log import RunLog, connect_to_write, round_rows
from roundtable.ps.coordinator.state.ledger import Ledger, Reported, RunEnd, SavedModel
from roundtable.ps.coordinator.state.membership import Membership
from roundtable.ps.coordinator.state.roster import Member
from roundtable.ps.coordinator.summary_metrics import Measured, measured


class RunHeader(msgspec.Struct, frozen=True):
    """The run of an event log, and its coordinator."""

    run: str
    #: Higher than that of the coordinator before.
    incarnation: int
    host: str
    settings: Settings
    #: The round of the checkpoint from which the run's processes began, or -1 if they began without one.
    resume: int = -1
    #: The key with which members' tickets are made.
    key: bytes = b""


class SavedMember(msgspec.Struct, frozen=True):
    """A member as the event log has it, for the next coordinator. See `Member` for the attributes."""

    hello: Hello
    incarnation: int
    left: bool
    lost: bool
    early: bool = False
    replaces: bool = False
    ended_at: int = -1
    failed: str = ""


@dataclass
class RestoredRun:
    """A run as `restore` found it in the event log. Times are unix seconds."""

    head: RunHeader
    ledger: Ledger
    members: dict[str, SavedMember] = field(default_factory=dict)
    #: The share tables. Empty if the run has not started.
    tables: list[ShareTable] = field(default_factory=list)
    #: (incarnation of the worker, number) of all metrics in the log.
    metrics: set[tuple[int, int]] = field(default_factory=set)
    #: The newest accuracy that a script measured.
    accuracy: Measured | None = None
    #: A sentence on each worker whose script has failed and without which the run goes on.
    failed: list[str] = field(default_factory=list)
    #: How many failures `worker_failures` has admitted.
    admitted: int = 0
    #: When the first plan was made.
    planned_at: float | None = None
    #: When the newest round was committed.
    committed_at: float | None = None
    #: Samples of the rounds before `head.resume`.
    samples_before: int = 0
    #: The hash of the trained model's parameters and the number of its rounds, if the model was written.
    model: tuple[str, int] | None = None
    #: How the run has ended, or None if it has not.
    stop: Stop | None = None


class StateWriter:
    """Writes changes of a run's state to the event log."""

    def __init__(self) -> None:
        #: The values that were last written, by kind and key.
        self._written: dict[tuple[str, str], Any] = {}

    def write(self, log: RunLog, head: RunHeader, membership: Membership, ledger: Ledger) -> None:
        """Hand new state to `log`. Its next flush writes that to the disk."""
        for kind, key, value in _state(head, membership, ledger):
            if self._written.get((kind, key)) != value:
                self._written[kind, key] = value
                log.state(kind, key, msgspec.msgpack.encode(value))

    def forget(self, log: RunLog, member: Member) -> None:
        """Keep only the name of a worker that never took part. The name is not given again."""
        self._written.pop(("member", member.name), None)
        kept = SavedMember(Hello("worker"), member.incarnation, left=False, lost=True)
        log.state("member", member.name, msgspec.msgpack.encode(kept))


def _state(head: RunHeader, membership: Membership, ledger: Ledger) -> Iterator[tuple[str, str, Any]]:
    yield "run", "", head
    for name, member in membership.members.items():
        kept = SavedMember(
            member.hello, member.incarnation, member.left, member.lost, member.early, member.replaces, member.ended_at,
            member.failed,
        )  # fmt: skip
        yield "member", name, kept
    yield "tables", "", membership.tables
    if ledger.setup is not None:
        yield "setup", "", ledger.setup
    for segment in ledger.segments:
        yield "plan", str(segment.index), segment
    if ledger.run_end is not None:
        yield "end", "", ledger.run_end
    for round_, value in ledger.states.items():
        yield "script", str(round_), value
    for name, saved in ledger.saved.items():
        yield "saved", name, saved
    for about, told in ledger.facts.items():
        yield "told", about, told
    for place, outcome in ledger.outcomes.items():
        yield "outcome", place, outcome
    for server, reported in ledger.reported.items():
        yield "reported", str(server), reported
    yield "pending", "", list(ledger.pending)
    yield "dropped", "", list(ledger.dropped)


def new_run(before: str = "") -> str:
    """Return a name for a new run, or the next name of the run `before`, whose processes all restart."""
    return f"{before.partition('.')[0] or secrets.token_hex(4)}.{secrets.token_hex(2)}"


def restore(path: Path, upto: int | None = None, has_finished: bool = False) -> RestoredRun | None:
    """Return the run in the event log at `path`, or None if no coordinator has written one.

    With `upto`, roll the event log back to the moment when exactly the rounds below `upto` were committed. Rows and reports of
    later rounds are deleted for good, and their micro-batches count as computed again. Members and plans are forgotten, except
    plans that rounds before `upto` need: the restarted processes send their own. The run gets another name. A crash leaves all of
    that done or nothing. The end that a script has asked for is kept, unless the run `has_finished` and is to go on after it.

    Raises UsageError if the file cannot be read, or if rounds below `upto` are missing from it.
    """
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(path, isolation_level=None) if upto is None else connect_to_write(path)) as db:
            if upto is None:
                return _read(db)
            db.execute("BEGIN IMMEDIATE")  # if an error is raised, closing the connection rolls this back
            if has_finished:
                db.execute("DELETE FROM state WHERE kind = 'end'")
            _put_back(db, path, upto)
            restored = _read(db)
            if restored is not None:
                head = restored.head
                restored.head = msgspec.structs.replace(head, run=new_run(head.run), resume=upto or -1)
                db.execute("UPDATE OR REPLACE state SET kind = 'planned' WHERE kind = 'plan'")
                db.execute("DELETE FROM state WHERE kind NOT IN ('planned', 'end', 'saved', 'script')")
                db.execute("INSERT INTO state VALUES ('run', '', ?)", (msgspec.msgpack.encode(restored.head),))
                restored.members, restored.tables = {}, []
            db.execute("COMMIT")
            return restored
    except (sqlite3.Error, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise UsageError(f"the event log of the run in {path} cannot be read: {error}.") from None


def _put_back(db: sqlite3.Connection, path: Path, upto: int) -> None:
    (there,) = db.execute("SELECT count(*) FROM rounds WHERE round < ?", (upto,)).fetchone()
    if there < upto:
        raise UsageError(f"{path} has {there} rounds of the {upto} before the one to go on from.")
    (rounds,) = db.execute("SELECT count(*) FROM rounds WHERE round >= ?", (upto,)).fetchone()
    query = "SELECT coalesce(sum(micro_batches), 0) FROM contributions WHERE round >= ? AND outcome NOT LIKE 'dropped%'"
    (micro_batches,) = db.execute(query, (upto,)).fetchone()
    for table in ("rounds", "contributions", "metrics"):
        db.execute(f"DELETE FROM {table} WHERE round >= ?", (upto,))
    db.execute("DELETE FROM status")  # other processes get the names from now on
    db.execute("DELETE FROM state WHERE kind IN ('reported', 'pending', 'dropped')")
    db.execute("DELETE FROM state WHERE kind = 'script' AND CAST(key AS INTEGER) >= ?", (upto,))
    db.execute("DELETE FROM events WHERE kind = 'stopped'")
    data = json.dumps({"to": upto, "rounds": rounds, "micro_batches": micro_batches})
    db.execute("INSERT INTO events VALUES (NULL,?,'rolled back','coordinator',?)", (time.time(), data))


def _read(db: sqlite3.Connection) -> RestoredRun | None:
    def state(kind: str, type_: type[Any]) -> dict[str, Any]:
        rows = db.execute("SELECT key, value FROM state WHERE kind = ?", (kind,))
        return {key: msgspec.msgpack.decode(value, type=type_) for key, value in rows}

    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'state'").fetchone() or not (heads := state("run", RunHeader)):
        return None
    head: RunHeader = heads[""]
    ledger = Ledger(head.settings, load(head.settings))
    for setup in state("setup", Setup).values():
        ledger.set_up(setup)
    ledger.facts = state("told", FirstFacts)
    plans = state("plan", Segment)
    # since the restart no worker may have sent the plans of rounds before `head.resume` again
    ledger.segments = ledger.earlier = _in_order({**state("planned", Segment), **plans})
    ledger.run_end = state("end", RunEnd).get("")
    ledger.saved = state("saved", SavedModel)
    ledger.states = {int(round_): value for round_, value in state("script", bytes).items()}
    ledger.outcomes = state("outcome", CollectiveOutcome)
    ledger.reported = {int(server): reported for server, reported in state("reported", Reported).items()}
    ledger.pending = [row for rows in state("pending", list[Committed]).values() for row in rows]
    ledger.dropped = [row for rows in state("dropped", list[Contribution]).values() for row in rows]
    restored = RestoredRun(head, ledger, state("member", SavedMember))
    restored.tables = [table for tables in state("tables", list[ShareTable]).values() for table in tables]
    _count(db, restored)
    for row in round_rows(db):
        ledger.book(Committed(row.round, row.samples, row.micro_batches, row.dropped, row.metrics, row.weight))
        restored.committed_at = row.at
        restored.samples_before += row.samples if row.round < head.resume else 0
    ledger.segments = _in_order(plans)
    query = "SELECT round, incarnation, number FROM metrics WHERE name = 'accuracy' ORDER BY seq DESC LIMIT 1"
    for round_, *call in db.execute(query).fetchall():
        values = db.execute("SELECT name, value FROM metrics WHERE incarnation = ? AND number = ?", call)
        restored.accuracy = measured(dict(values), round_)
    for at, kind, text in db.execute("SELECT at, kind, data FROM events ORDER BY seq"):
        match kind:
            case "started":
                restored.planned_at = None
            case "plan":
                restored.planned_at, restored.model = restored.planned_at or at, None
            case "model":
                data = json.loads(text)
                restored.model = data["weights_sha256"], data["round"]
            case "rolled back":
                restored.model = None
                ledger.totals.micro_batches_recomputed += json.loads(text)["micro_batches"]
            case "lost" if (failed := json.loads(text).get("failed")) is not None:
                restored.failed.append(json.loads(text)["why"])
                restored.admitted += failed == "admitted"
            case "stopped":
                data = json.loads(text)
                restored.stop = Stop(data["ok"], data["reason"], data.get("restart", False), data.get("on_request", False))
    return restored


def _in_order(segments: dict[str, Segment]) -> list[Segment]:
    return sorted(segments.values(), key=lambda segment: segment.index)


def _count(db: sqlite3.Connection, restored: RestoredRun) -> None:
    """Fill in the counts that come from many rows, without reading each row."""
    counts = "SELECT outcome, staleness, count(*), sum(micro_batches) FROM contributions GROUP BY outcome, staleness"
    for row in db.execute(counts):
        restored.ledger.count(*row)
    restored.metrics = set(db.execute("SELECT DISTINCT incarnation, number FROM metrics"))
    query = "SELECT DISTINCT worker FROM contributions WHERE round >= ?"  # earlier rows have names of other processes
    restored.ledger.contributors = {worker for (worker,) in db.execute(query, (restored.head.resume,))}
