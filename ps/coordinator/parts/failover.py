"""Takes over the run of a coordinator that has died."""

from __future__ import annotations

import time
from collections.abc import Callable

from roundtable.common.protocol.effects import number_of
from roundtable.common.protocol.messages.commit import Norms, RoundReady
from roundtable.common.protocol.messages.session import Heartbeat, Hello
from roundtable.ps.coordinator.context import Received, RunContext
from roundtable.ps.coordinator.recovery import RestoredRun
from roundtable.ps.coordinator.state.failure_detector import NEAR_S
from roundtable.ps.coordinator.state.roster import Member

#: A new coordinator waits this many seconds for members to connect.
_REJOIN_S = 5.0
#: The silence of members does not count in this many seconds after a take-over: they need time to find the new coordinator.
_FIND_S = 4.0


class Failover:
    """Knows which members have not found this coordinator, and asks servers for decisions of the coordinator before."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        #: When this coordinator took over, or None if it did not.
        self._recovered_at: float | None = None
        #: The newest round that the coordinator before can have decided, once known.
        self._inherits_to: int | None = None

    def take_over(self, restored: RestoredRun, is_dead: Callable[[Hello], bool], now: float) -> None:
        """Take over the members of the coordinator before. `is_dead` returns True if a process has certainly ended."""
        committed = self._context.ledger.committed
        self._context.membership.restore(
            [
                Member(
                    name,
                    saved.hello,
                    saved.incarnation,
                    now - NEAR_S if is_dead(saved.hello) and not saved.left else now + _FIND_S,
                    Heartbeat(round=committed),
                    left=saved.left,
                    lost=saved.lost,
                    early=saved.early,
                    replaces=saved.replaces,
                    ended_at=saved.ended_at,
                    failed=saved.failed,
                )
                for name, saved in restored.members.items()
            ],
            restored.tables,
        )
        if restored.committed_at is not None:
            self._context.committed_at = restored.committed_at + now - time.time()
        self._recovered_at = now

    def awaits_members(self, now: float) -> bool:
        """Return whether this coordinator took over within _REJOIN_S seconds and has no route to some member."""
        if self._recovered_at is None or now > self._recovered_at + _REJOIN_S:
            return False
        members, routes = self._context.membership.members.items(), self._context.mail.routes
        return any(not member.lost and not member.early and name not in routes for name, member in members)

    def decide(self, message: Received[RoundReady] | Received[Norms]) -> None:
        """Send all servers the decision that a server asks for, if it can be made now.

        After a take-over, ask the other servers for a decision that the coordinator before may have given. No such decision can
        be about a later round than the first question.
        """
        context, question = self._context, message.body
        if question.coordinator != context.head.incarnation:
            return  # the question was for the coordinator before, whose answer may have arrived since
        number, decisions = number_of(message.member.name), context.decisions
        answers = (
            decisions.round_ready(number, question) if isinstance(question, RoundReady) else decisions.norms(number, question)
        )
        context.mail.to_servers(answers)
        if self._recovered_at is not None and not answers:
            self._inherits_to = question.round if self._inherits_to is None else self._inherits_to
            if question.round <= self._inherits_to:
                for name in set(context.membership.names("server")) - {message.member.name}:
                    context.mail.send(name, question)
