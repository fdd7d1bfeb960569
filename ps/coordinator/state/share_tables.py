"""The share tables: one for each membership epoch. Shares follow the workers' measured speeds."""

from __future__ import annotations

from roundtable.common.config.settings import Settings
from roundtable.common.config.work_shares import ShareTable, shares
from roundtable.ps.coordinator.state.roster import Roster

#: Seconds between two comparisons of the shares with the measured speeds.
RESHARE_S = 2.0
#: A new table holds from this many rounds after the newest known one, so that all workers have it first. If a worker has not,
#: some micro-batches are missing or done twice, and are reassigned.
_LEAD_ROUNDS = 2
#: The rounds of this many seconds, at the last speed, are added.
_LEAD_S = 1.5
#: The same if a worker is gone. It is short, because others do the lost share micro-batch by micro-batch until then.
_LEAD_WITHOUT_S = 0.3
#: At most this many tables are kept.
_MOST_TABLES = 8


class ShareTables:
    """The share tables in force. A new one holds only from a round that no worker has begun."""

    def __init__(self, settings: Settings, roster: Roster, now: float) -> None:
        self._settings = settings
        self._roster = roster
        #: The tables, oldest first. Empty until the run starts.
        self.tables: list[ShareTable] = []
        #: When `should_change` last compared speeds.
        self._looked_at = now
        #: The newest round that a worker was in then.
        self._newest = 0
        #: Rounds per second between the last two comparisons.
        self._pace = 0.0

    def start(self, epoch: int, workers: list[str]) -> None:
        """Give all workers equal shares."""
        self.tables = [ShareTable(epoch, 0, workers, [1] * len(workers))]

    def restore(self, tables: list[ShareTable]) -> None:
        """Take over the tables of the coordinator before."""
        self.tables = tables
        self._newest = self._roster.newest_round()

    def add(self, epoch: int, workers: list[str]) -> None:
        """Add a table for `workers`, by their measured speeds."""
        gone = [not self._roster.members[name].active for name in self.tables[-1].workers]
        if all(gone):  # no round can be in progress, so the table holds at once
            self.tables = [ShareTable(epoch, 0, workers, self._weights(workers))]
            return
        lead = _LEAD_ROUNDS + round(self._pace * (_LEAD_WITHOUT_S if any(gone) else _LEAD_S))
        first = max(self._roster.newest_round() + lead, self.tables[-1].from_round + 1)
        self.tables = [*self.tables[1 - _MOST_TABLES :], ShareTable(epoch, first, workers, self._weights(workers))]

    def should_change(self, now: float) -> bool:
        """Every RESHARE_S, compare shares with the measured speeds. Return whether other shares would fit better."""
        if now - self._looked_at <= RESHARE_S:
            return False
        newest = self._roster.newest_round()
        self._pace = (newest - self._newest) / (now - self._looked_at)
        self._newest, self._looked_at = newest, now
        return self._speeds_changed()

    def _speeds_changed(self) -> bool:
        """Return whether shares by the current speeds would move a micro-batch."""
        workers, table = self._roster.names("worker"), self.tables[-1]
        if workers != table.workers or any(self._roster.members[worker].heartbeat.rate <= 0 for worker in workers):
            return False
        count = -(-self._settings.global_batch // self._settings.micro_batch)
        return shares(count, self._weights(workers)) != shares(count, table.weights)

    def _weights(self, workers: list[str]) -> list[int]:
        """Return each worker's speed in hundredths of the fastest one's. Workers without a measurement get the mean."""
        rates = [self._roster.members[worker].heartbeat.rate for worker in workers]
        known = [rate for rate in rates if rate > 0]
        if not known:
            return [1] * len(workers)
        mean = sum(known) / len(known)
        return [max(1, round(100 * (rate or mean) / max(known))) for rate in rates]
