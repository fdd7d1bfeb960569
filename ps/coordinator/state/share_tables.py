"""The shares of workers in each round: a table for each membership epoch, which follows the measured speeds."""

from __future__ import annotations

from roundtable.common.config.settings import Settings
from roundtable.common.config.work_shares import ShareTable, shares
from roundtable.ps.coordinator.state.roster import Roster

#: Seconds between two looks at whether shares should follow the measured speeds.
RESHARE_S = 2.0
#: A new table holds from so many rounds after the newest known one, so that the news gets everywhere first. If it does not,
#: micro-batches are missing or done twice, and are reassigned.
_LEAD_ROUNDS = 2
#: And from so many seconds later, at the speed of the last rounds.
_LEAD_S = 1.5
#: So many seconds if a worker is gone: until then others do its share micro-batch by micro-batch, which takes longer.
_LEAD_WITHOUT_S = 0.3
#: Tables that are kept.
_MOST_TABLES = 8


class ShareTables:
    """The tables in force. A new one holds only from a round on that nobody has begun."""

    def __init__(self, settings: Settings, roster: Roster, now: float) -> None:
        self._settings = settings
        self._roster = roster
        #: Oldest first. Empty until the run starts.
        self.tables: list[ShareTable] = []
        self._looked_at = now
        #: The newest round that a worker was in at the last look.
        self._newest = 0
        #: Rounds per second between the last two looks.
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
        if all(gone):  # nobody has begun anything
            self.tables = [ShareTable(epoch, 0, workers, self._weights(workers))]
            return
        lead = _LEAD_ROUNDS + round(self._pace * (_LEAD_WITHOUT_S if any(gone) else _LEAD_S))
        first = max(self._roster.newest_round() + lead, self.tables[-1].from_round + 1)
        self.tables = [*self.tables[1 - _MOST_TABLES :], ShareTable(epoch, first, workers, self._weights(workers))]

    def should_change(self, now: float) -> bool:
        """Look at the speeds from time to time. Return whether other shares would follow them better."""
        if now - self._looked_at <= RESHARE_S:
            return False
        newest = self._roster.newest_round()
        self._pace = (newest - self._newest) / (now - self._looked_at)
        self._newest, self._looked_at = newest, now
        return self._speeds_changed()

    def _speeds_changed(self) -> bool:
        """Return whether shares by the speeds measured now would move a micro-batch."""
        workers, table = self._roster.names("worker"), self.tables[-1]
        if workers != table.workers or any(self._roster.members[worker].heartbeat.rate <= 0 for worker in workers):
            return False
        count = -(-self._settings.global_batch // self._settings.micro_batch)
        return shares(count, self._weights(workers)) != shares(count, table.weights)

    def _weights(self, workers: list[str]) -> list[int]:
        """Return samples per second, relative to the fastest, in hundredths. Workers without a measurement get the mean."""
        rates = [self._roster.members[worker].heartbeat.rate for worker in workers]
        known = [rate for rate in rates if rate > 0]
        if not known:
            return [1] * len(workers)
        mean = sum(known) / len(known)
        return [max(1, round(100 * (rate or mean) / max(known))) for rate in rates]
