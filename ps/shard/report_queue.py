"""News of a server for the coordinator, which are sent again until they are in the ledger."""

from __future__ import annotations

from roundtable.common.protocol.effects import COORDINATOR, Send
from roundtable.common.protocol.messages.commit import Committed, Contribution, Report
from roundtable.common.protocol.transport import ASK_AGAIN_S

#: Seconds between two reports to the coordinator while there is news.
REPORT_S = 0.2


class ReportQueue:
    """What is to be reported, and the report that is on its way."""

    def __init__(self) -> None:
        self.rounds: list[Committed] = []
        self.contributions: list[Contribution] = []
        self.dropped: list[Contribution] = []
        #: Whether the process in whose place this one is may have reported some of it.
        self.may_repeat = False
        #: The version that the coordinator knows.
        self.reported_version = -1
        self._under_way: Report | None = None
        self._sent_at = 0.0

    def tick(self, now: float, version: int) -> list[Send]:
        """Return the report that is due: the one on its way again, or a new one if there is news."""
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
        """The coordinator has the report of that number."""
        if self._under_way is not None and self._under_way.seq == seq:
            self.reported_version = self._under_way.version
            self._under_way = None
