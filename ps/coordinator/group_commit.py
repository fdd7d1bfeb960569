"""Group commit: writes the event log, then sends the messages that depend on what was written."""

from __future__ import annotations

import logging
from pathlib import Path

from roundtable.common.protocol.messages.base import Body
from roundtable.common.runtime.failpoints import failpoint
from roundtable.common.storage import disk_alarm
from roundtable.common.storage.event_log import FILE_NAME, ContributionRow, Event, RoundRow, RunLog
from roundtable.ps.coordinator.recovery import RunHeader, StateWriter
from roundtable.ps.coordinator.state.ledger import Ledger
from roundtable.ps.coordinator.state.membership import Membership
from roundtable.ps.coordinator.state.roster import Member

log = logging.getLogger("roundtable.ps.coordinator")

#: At most this many seconds pass before a promised message is sent.
_PROMISE_S = 0.1
#: Seconds between two alarms if the event log cannot be written.
ALARM_S = 30.0


class GroupCommit:
    """Writes to the event log in `run_dir`. Times are those of the coordinator's clock, in seconds."""

    def __init__(self, run_dir: Path, head: RunHeader, membership: Membership, ledger: Ledger, now: float) -> None:
        self.log = RunLog(run_dir / FILE_NAME)
        self._head, self._membership, self._ledger = head, membership, ledger
        self._state_writer = StateWriter()
        #: (route, message) to send when the event log is on the disk.
        self._promises: list[tuple[bytes, Body]] = []
        #: True if a process cannot go on without one of these messages.
        self.is_urgent = False
        #: Since when the event log cannot be written, or None if it can.
        self.unwritten_since: float | None = None
        #: When that was last reported.
        self._alarmed_at = float("-inf")
        self._flushed_at = now

    def promise(self, route: bytes, body: Body, urgent: bool = False) -> None:
        """Queue `body`, which `flush` returns once the event log is on the disk. With `urgent`, the flush should come at once."""
        self._promises.append((route, body))
        self.is_urgent |= urgent

    def warn(self, text: str) -> None:
        """Write a warning to the log, and to the event log, which the launcher shows."""
        log.warning("%s", text)
        self.log.event(Event("warning", "coordinator", {"text": text}))

    def forget(self, worker: Member) -> None:
        """Keep in the event log only the name of a worker that never took part."""
        self._state_writer.forget(self.log, worker)

    def enter_rows(self) -> bool:
        """Hand the ledger's new rows to the event log. Return whether rounds are among them."""
        rounds, contributions = self._ledger.new_rounds, self._ledger.new_contributions
        self._ledger.new_rounds, self._ledger.new_contributions = [], []
        for row in rounds:
            epoch = self._ledger.epoch_of(row.round)
            self.log.round(RoundRow(row.round, epoch, row.samples, row.micro_batches, row.dropped, row.metrics, row.weight))
        for c in contributions:
            self.log.contribution(
                ContributionRow(c.round, c.lo, c.hi, c.worker, c.samples, c.outcome, c.staleness, c.micro_batches)
            )
            if c.outcome == "dropped in part":
                self.warn(
                    f"micro-batch {c.lo} of round {c.round} was computed from different weights, and not every result is finite: "
                    f"some servers dropped the gradient of {c.worker}, and others applied another one."
                )
        return bool(rounds)

    def enter_state(self) -> None:
        """Hand all other new state to the event log. Its next flush writes that to the disk."""
        self._state_writer.write(self.log, self._head, self._membership, self._ledger)

    def is_due(self, now: float) -> bool:
        """Return whether a promised message has waited long enough for a flush."""
        return bool(self._promises) and now >= self._flushed_at + _PROMISE_S

    def flush(self, now: float) -> list[tuple[bytes, Body]]:
        """Write the event log to the disk. Return the promised messages, or none if that fails: waiting processes ask again."""
        self._flushed_at = now
        promises, self._promises, self.is_urgent = self._promises, [], False
        try:
            self.log.flush()
        except Exception as error:  # a full disk must not stop the run; rows are kept for the next try
            self.unwritten_since = self.unwritten_since or now
            if now >= self._alarmed_at + ALARM_S:
                self._alarmed_at = now
                text = f"the event log cannot be written ({error}). Is the disk full? Training continues; progress is not shown."
                disk_alarm.raise_alarm(text)
                log.error(text)
            return []
        failpoint("flushed", self._ledger.committed)
        if self.unwritten_since is not None:
            text = f"the event log could not be written for {now - self.unwritten_since:.0f} s; {self.log.lost} rows are lost"
            self.unwritten_since, self._alarmed_at = None, float("-inf")
            disk_alarm.raise_alarm("")
            self.warn(text)
        return promises
