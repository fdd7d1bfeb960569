"""A server's reports to the coordinator. Each report is sent again until it is in the ledger."""

from __future__ import annotations

from roundtable.common.protocol.effects import COORDINATOR, Send
from roundtable.common.protocol.messages.commit import Committed, Contribution, Report
from roundtable.common.protocol.transport import ASK_AGAIN_S

#: Seconds between two reports to the coordinator.
REPORT_S = 0.2


class ReportQueue:
    """Rounds and contributions that wait to be reported, and the report that is not acknowledged."""

    def __init__(self) -> None:
        #: Closed rounds, on server 0.
        self.rounds: list[Committed] = []
        #: Rows for the ledger, on server 0.
        self.contributions: list[Contribution] = []
        #: Micro-batches of closed rounds that this server dropped.
        self.dropped: list[Contribution] = []
        #: True if the process that this one replaced may have reported some of the waiting rounds.
        self.may_repeat = False
        #: The newest version that the coordinator has acknowledged.
        self.reported_version = -1
        self._under_way: Report | None = None
        self._sent_at = 0.0

    def tick(self, now: float, version: int) -> list[Send]:
        """Return the report that is due: an unacknowledged one again, or a new one if there is something to report."""
        if self._under_way is None:
            is_news = self.contributions or self.rounds or version != self.reported_version
            if not is_news or now < self._sent_at + REPORT_S:
                return []
            seq = int(now * 1e6)
            self._under_way = Report(seq, version, self.rounds, self.contributions, self.may_repeat, self.dropped)
            self.rounds, self.contributions, self.may_repeat, self.dropped = [], [], False, []
        elif now < self._sent_at + ASK_AGAIN_S:
            return []
        self._sent_at = now
        return [Send(COORDINATOR, self._under_way)]

    def acknowledged(self, seq: int) -> None:
        """Note that the coordinator has the report numbered `seq`."""
        if self._under_way is not None and self._under_way.seq == seq:
            self.reported_version = self._under_way.version
            self._under_way = None
