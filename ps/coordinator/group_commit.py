"""The coordinator's books as they are written: rows and state for the event log, and what was promised for when they are on the
disk."""

from __future__ import annotations

import logging
from pathlib import Path

from roundtable.common.protocol.messages.base import Body
from roundtable.common.runtime.failpoints import failpoint
from roundtable.common.storage import disk_alarm
from roundtable.common.storage.event_log import FILE_NAME, ContributionRow, Event, RoundRow, RunLog
from roundtable.ps.coordinator.recovery import BackupHolder, RunHeader
from roundtable.ps.coordinator.state.ledger import Ledger
from roundtable.ps.coordinator.state.membership import Membership
from roundtable.ps.coordinator.state.roster import Member

log = logging.getLogger("roundtable.ps.coordinator")

#: Seconds that somebody waits at most to hear that the books are kept, and between two alarms where they cannot be.
_PROMISE_S = 0.1
ALARM_S = 30.0


class GroupCommit:
    """Writes to the event log in `run_dir`, at `log`. Times are the coordinator's clock's, in seconds."""

    def __init__(self, run_dir: Path, head: RunHeader, membership: Membership, ledger: Ledger, now: float) -> None:
        self.log = RunLog(run_dir / FILE_NAME)
        self._head, self._membership, self._ledger = head, membership, ledger
        self._keeper = BackupHolder()
        #: To whom to send what once the books are on the disk, and whether somebody cannot go on without it.
        self._promises: list[tuple[bytes, Body]] = []
        self.is_urgent = False
        #: Since when the event log cannot be written, if so, and when that was last told.
        self.unwritten_since: float | None = None
        self._alarmed_at = float("-inf")
        self._flushed_at = now

    def promise(self, route: bytes, body: Body, urgent: bool = False) -> None:
        """Have `flush` give `body` back when what it says is on the disk. `urgent`: a flush should come at once."""
        self._promises.append((route, body))
        self.is_urgent |= urgent

    def warn(self, text: str) -> None:
        """Tell of something in the log and, when it can be written, in the event log, which the launcher shows."""
        log.warning("%s", text)
        self.log.event(Event("warning", "coordinator", {"text": text}))

    def forget(self, worker: Member) -> None:
        """Keep no more than the name of a worker that never took part."""
        self._keeper.forget(self.log, worker)

    def enter_rows(self) -> bool:
        """Hand the log what the ledger has collected. Whether rounds were in it."""
        rounds, contributions = self._ledger.new_rounds, self._ledger.new_contributions
        self._ledger.new_rounds, self._ledger.new_contributions = [], []
        for row in rounds:
            epoch = self._ledger.epoch_of(row.round)
            self.log.round(RoundRow(row.round, epoch, row.samples, row.micro_batches, row.dropped, row.metrics))
        for c in contributions:
            self.log.contribution(
                ContributionRow(c.round, c.lo, c.hi, c.worker, c.samples, c.outcome, c.staleness, c.micro_batches)
            )
            if c.outcome == "dropped in part":
                self.warn(
                    f"micro-batch {c.lo} of round {c.round} is not finite from all weights it was computed from, "
                    f"and so some of its gradient was left out, that of {c.worker}, and some applied."
                )
        return bool(rounds)

    def enter_state(self) -> None:
        """Hand the log what else is new in the books; its next flush puts it on the disk."""
        self._keeper.keep(self.log, self._head, self._membership, self._ledger)

    def is_due(self, now: float) -> bool:
        """Whether somebody has waited for a flush for long enough."""
        return bool(self._promises) and now >= self._flushed_at + _PROMISE_S

    def flush(self, now: float) -> list[tuple[bytes, Body]]:
        """Have what was entered on the disk. What was promised for then; nothing if it fails, for who waits asks again."""
        self._flushed_at = now
        promises, self._promises, self.is_urgent = self._promises, [], False
        try:
            self.log.flush()
        except Exception as error:  # a full disk must not stop the run; rows are kept for the next try
            self.unwritten_since = self.unwritten_since or now
            if now >= self._alarmed_at + ALARM_S:
                self._alarmed_at = now
                text = f"the event log cannot be written ({error}): is the disk full? Training goes on, and nobody sees how far."
                disk_alarm.sound(text)
                log.error(text)
            return []
        failpoint("flushed", self._ledger.committed)
        if self.unwritten_since is not None:
            text = f"the event log could not be written for {now - self.unwritten_since:.0f} s; {self.log.lost} rows are lost"
            self.unwritten_since, self._alarmed_at = None, float("-inf")
            disk_alarm.sound("")
            self.warn(text)
        return promises
