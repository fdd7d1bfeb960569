"""The coordinator is killed with -9 in mid-run and at the very end, and started again.

No bit of the weights and no row of the event log is another, and no round is done again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from test_exactness import plain_loop, sha256

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

EPOCHS = 6


class Killer(threading.Thread):
    """Kills the coordinator of the run in `folder` each time that so many rounds are in its event log.

    It also kills the coordinator when the summary is written but nobody has been told.
    """

    def __init__(self, folder: Path, rounds: list[int]) -> None:
        super().__init__(daemon=True)
        self._folder = folder
        self._rounds = rounds
        self.killed: list[int] = []

    def run(self) -> None:
        for rounds in self._rounds:
            while True:
                pid = self._coordinator(rounds)
                if pid is not None and pid not in self.killed:
                    break
                time.sleep(0.02)
            self._kill(pid)
        while not (self._folder / "summary.json").exists():
            time.sleep(0.002)
        last = self._coordinator(0)
        if last is not None:
            self._kill(last)

    def _kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self.killed.append(pid)

    def _coordinator(self, rounds: int) -> int | None:
        """The newest coordinator's process, once there are so many rounds."""
        with contextlib.suppress(sqlite3.Error), contextlib.closing(self._restored()) as db:
            if db.execute("SELECT count(*) FROM rounds").fetchone()[0] >= rounds:
                query = "SELECT data FROM events WHERE kind IN ('started', 'recovered') ORDER BY seq DESC"
                return int(json.loads(db.execute(query).fetchone()[0])["pid"])
        return None

    def _restored(self) -> sqlite3.Connection:
        return sqlite3.connect(f"file:{self._folder / 'events.sqlite'}?mode=ro", uri=True)


def test_weights_and_ledger_are_those_of_a_run_whose_coordinator_lived(launch, tmp_path: Path) -> None:
    recipe = "adamw"  # clips: in each round all servers are told of all norms
    killer = Killer(tmp_path / "run", [5, 25])
    killer.start()
    script = Path(__file__).with_name("train_exact.py")
    summary = launch("--workers", 2, "--servers", 2, script, "--", recipe, "--epochs", EPOCHS, "--slow", 1)
    killer.join(10.0)
    assert len(set(killer.killed)) == 3
    assert summary["weights_sha256"] == sha256(plain_loop(recipe, EPOCHS))
    assert (summary["rounds"], summary["samples"]) == (9 * EPOCHS, 1000 * EPOCHS)
    assert summary["micro_batches_committed"] == (8 * 8 + 3) * EPOCHS
    with contextlib.closing(sqlite3.connect(tmp_path / "run" / "events.sqlite")) as db:
        rows = db.execute("SELECT round, lo, hi, samples FROM contributions WHERE outcome = 'committed'").fetchall()
        (recovered,) = db.execute("SELECT count(*) FROM events WHERE kind = 'recovered'").fetchone()
        (duplicates,) = db.execute("SELECT count(*) FROM contributions WHERE outcome = 'duplicate'").fetchone()
    counted = Counter((row[0], k) for row in rows for k in range(row[1], row[2]))
    assert set(counted.values()) == {1} and len(counted) == summary["micro_batches_committed"]
    assert sum(row[3] for row in rows) == summary["samples"] and duplicates == summary["duplicates_ignored"]
    assert recovered == 3
