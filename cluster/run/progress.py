"""The progress of a run, read from its event log while the run goes on."""

from __future__ import annotations

import sqlite3
import time
from collections import deque
from collections.abc import Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from roundtable.common.network.host_identity import here
from roundtable.common.storage.event_log import Event, RoundRow, RunLogReader, StatusRow

#: How progress is shown. `auto`: live on a terminal, elsewhere in plain lines.
Mode = Literal["auto", "live", "plain", "off"]

#: Seconds over which speed and loss are means.
_WINDOW_S = 5.0
#: Seconds whose mean speed gives the time left.
_LONG_WINDOW_S = 60.0


@dataclass(frozen=True)
class Progress:
    """The state of a run at one moment."""

    #: Committed rounds, or merges.
    rounds: int = 0
    #: The planned rounds, or merges. None while there is no plan.
    total: int | None = None
    samples: int = 0
    samples_per_second: float = 0.0
    loss: float | None = None
    accuracy: float | None = None
    processes: Sequence[StatusRow] = ()
    #: Lines on events since the last look that the user may have to act on.
    news: Sequence[str] = ()
    #: The newest name in the run of each process of this host, by process id.
    joined: Mapping[int, str] = field(default_factory=dict)
    #: Names of processes that have left the run.
    left: Set[str] = frozenset()
    #: Names of processes that failed after the last round, which does not fail the run.
    failed_late: Set[str] = frozenset()
    #: Whether the trained model is written.
    has_model: bool = False
    #: Name and process id of each process of this host that the coordinator has counted as lost.
    lost: Set[tuple[str, int]] = frozenset()
    #: A fault that the event log cannot tell, while it lasts. '' if there is none.
    alarm: str = ""
    #: Whether `rounds` and `total` count merges, which are of several rounds each.
    merges: bool = False
    #: The data epoch of the newest round, from 1 on. 0 if it is not known.
    epoch: int = 0
    #: The planned data epochs. 0 if the number is not known.
    epochs: int = 0
    #: Seconds until all rounds are done, at the speed of the last minute.
    left_s: float | None = None
    #: Samples per second of each worker that has contributed lately; they add up to `samples_per_second`.
    speeds: Mapping[str, float] = field(default_factory=dict)
    #: Seconds for which each process has waited for the same other processes.
    waits_s: Mapping[str, float] = field(default_factory=dict)
    #: The newest checkpoint: its round, and the seconds since it was made.
    checkpoint: tuple[int, float] | None = None


class Tracker:
    """Reads the new entries of the event log at `path`, which need not exist yet.

    Each look opens the file. Once the run is over, looks leave it alone, because an open reader hinders the coordinator from
    closing its log.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = Progress()
        self._last_round = -1
        self._last_event = 0
        #: Rounds of the last minute.
        self._minute: deque[RoundRow] = deque()
        #: The contributions of the last `_WINDOW_S` seconds: unix time, worker, samples.
        self._contributed: deque[tuple[float, str, int]] = deque()
        #: The number of the newest contribution that was read.
        self._last_contribution = 0
        #: For each process, the processes that it waits for, and the unix time since when.
        self._waits: dict[str, tuple[str, float]] = {}
        self._checkpoint: tuple[int, float] | None = None
        #: Unix time of the first plan of this part of the run. None before it.
        self._first_at: float | None = None
        #: Unix time when the coordinator of this part started.
        self._part_at = 0.0
        self._over = False

    def look(self, now: float | None = None) -> Progress:
        """Return the state of the run at the unix time `now`."""
        if self._over or not self._path.exists():
            return replace(self._last, news=())
        try:
            with closing(RunLogReader(self._path)) as reader:
                self._last = self._read(reader, time.time() if now is None else now)
        except sqlite3.Error:
            return replace(self._last, news=())  # the coordinator has not written to it yet, or is closing it: look again later
        return self._last

    def _read(self, reader: RunLogReader, now: float) -> Progress:
        # Read all before noting anything, so that a look that fails in the middle loses nothing.
        events = reader.events(after=self._last_event)
        goes_back = any(event.kind == "rolled back" for _, _, event in events)
        rounds_read = reader.rounds(after=-1 if goes_back else self._last_round)
        contributed = reader.committed_samples(0 if goes_back else self._last_contribution, now - _WINDOW_S)
        accuracy, statuses = reader.newest_metric("accuracy"), reader.statuses()

        last = self._last
        total, merges, epochs, over, news = last.total, last.merges, last.epochs, False, []
        joined, left, lost = dict(last.joined), set(last.left), set(last.lost)
        failed_late, has_model = set(last.failed_late), last.has_model
        rounds, samples = last.rounds, last.samples
        for number, at, event in events:
            self._last_event = number
            if event.kind == "plan":
                total, has_model = int(event.data["rounds"]), False
                merges, epochs = bool(event.data.get("merges")), int(event.data.get("epochs", 0))
                self._first_at = self._first_at or at
            elif event.kind == "started":  # names are those of other processes from here on
                joined, left, failed_late, has_model = dict.fromkeys(joined, ""), set(), set(), False
                self._first_at, self._part_at = None, at
                self._minute.clear()
            elif event.kind == "joined" and event.data["place"] == here().pids:
                joined[event.data["pid"]] = event.process
            elif event.kind == "lost":
                if joined.get(pid := event.data.get("pid", -1)) == event.process:  # another process may have the name by now
                    lost.add((event.process, pid))
            elif event.kind == "rolled back":
                rounds, samples = self._go_back(rounds_read, int(event.data["to"]))
            elif event.kind == "left":
                left.add(event.process)
                if "failed" in event.data:
                    failed_late.add(event.process)
            elif event.kind == "ends":
                total = int(event.data["updates"])
            elif event.kind == "model":
                has_model = True
            elif event.kind == "checkpoint":
                self._checkpoint = int(event.data["round"]), at
            over = over or (event.kind == "stopped" and not event.data.get("restart"))  # else all restart
            if (line := _news(event)) is not None:
                news.append(line)
        rows = [row for row in rounds_read if row.round > self._last_round]
        if rows:
            self._last_round = rows[-1].round
            self._minute.extend(row for row in rows if row.at >= self._part_at)
        while len(self._minute) > 1 and self._minute[0].at < now - _LONG_WINDOW_S:
            self._minute.popleft()
        recent = [row for row in self._minute if row.at >= now - _WINDOW_S] or list(self._minute)[-1:]
        statuses.sort(key=lambda row: in_order(row.process))
        self._over, speed = over, self._speed(now)
        return Progress(
            rounds=rounds + len(rows),
            total=total,
            merges=merges,
            samples=samples + sum(row.samples for row in rows),
            samples_per_second=speed,
            loss=mean_metric(recent, "loss"),
            accuracy=accuracy,
            processes=statuses,
            news=news,
            joined=joined,
            left=left,
            failed_late=failed_late,
            has_model=has_model,
            lost=lost,
            epoch=self._minute[-1].epoch + 1 if self._minute else last.epoch,
            epochs=epochs,
            left_s=self._left(now, total, rounds + len(rows)),
            speeds=self._speeds(contributed, now, speed),
            waits_s=self._waited(statuses, now),
            checkpoint=self._checkpoint and (self._checkpoint[0], max(0.0, now - self._checkpoint[1])),
        )

    def _go_back(self, rounds: Sequence[RoundRow], to: int) -> tuple[int, int]:
        """Forget the rounds from `to` on, which are done again. Return the number of earlier rounds, and of their samples."""
        self._last_round = to - 1
        self._minute = deque(row for row in self._minute if row.round < to)
        self._last_contribution = 0
        self._contributed.clear()
        kept = [row for row in rounds if row.round < to]
        return len(kept), sum(row.samples for row in kept)

    def _speed(self, now: float) -> float:
        recent = [row for row in self._minute if row.at >= now - _WINDOW_S]
        start = self._since(now, _WINDOW_S)
        return sum(row.samples for row in recent) / (now - start) if now > start else 0.0

    def _since(self, now: float, window_s: float) -> float:
        """Return the unix time when the window that ends now began: not before training began."""
        return max(self._first_at or (self._minute[0].at if len(self._minute) > 1 else now), now - window_s)

    def _left(self, now: float, total: int | None, done: int) -> float | None:
        start = self._since(now, _LONG_WINDOW_S)
        recent = sum(row.at >= start for row in self._minute)
        if total is None or not recent or now <= start:
            return None
        return max(0, total - done) * (now - start) / recent

    def _speeds(self, contributed: Sequence[tuple[int, float, str, int]], now: float, speed: float) -> dict[str, float]:
        """Divide `speed` among the workers by the samples that they have contributed."""
        for number, at, worker, samples in contributed:
            self._last_contribution = number
            self._contributed.append((at, worker, samples))
        while self._contributed and self._contributed[0][0] < now - _WINDOW_S:
            self._contributed.popleft()
        by_worker: dict[str, int] = {}
        for _, worker, samples in self._contributed:
            by_worker[worker] = by_worker.get(worker, 0) + samples
        whole = sum(by_worker.values())
        return {worker: speed * samples / whole for worker, samples in by_worker.items()} if whole else {}

    def _waited(self, rows: Sequence[StatusRow], now: float) -> dict[str, float]:
        """Note which process waits for which. Return the seconds that each has waited."""
        before, self._waits = self._waits, {}
        for row in rows:
            if row.waits_for:
                same = before.get(row.process, ("", now))
                self._waits[row.process] = same if same[0] == row.waits_for else (row.waits_for, now)
        return {process: now - since for process, (_, since) in self._waits.items()}


def in_order(process: str) -> tuple[str, int]:
    """Return a key that sorts worker-2 before worker-10."""
    role, _, number = process.rpartition("-")
    return role, int(number) if number.isdigit() else -1


def _news(event: Event) -> str | None:
    """Return the line for the screen on an event. None if events of its kind are not shown."""
    match event.kind:
        case "warning":
            return f"warning: {event.data['text']}"
        case "lost":
            is_server = event.process.startswith("server")
            then = "waiting for its replacement" if is_server else "its work was reassigned"
            return f"{event.process} died: {event.data['why']}; {then}."
        case "restarted":
            return f"restarting all processes from the newest checkpoint: {event.data['reason']}"
        case "ends":
            return f"the run ends after round {event.data['round']}, as {event.process} has asked: {event.data['reason']}"
        case "waiting":
            return f"the run waits for {event.data['for']}."
        case "rolled back":
            redone = f", redoing {event.data['rounds']} rounds" if event.data["rounds"] else ""
            return f"resumed at round {event.data['to']}{redone}."
    return None


def mean_metric(rows: Sequence[RoundRow] | deque[RoundRow], name: str) -> float | None:
    """Return the weighted mean of a metric over `rows`. None if no round has the metric."""
    having = [row for row in rows if name in row.metrics and row.total_weight > 0]
    weight = sum(row.total_weight for row in having)
    return sum(row.metrics[name] * row.total_weight for row in having) / weight if weight else None
