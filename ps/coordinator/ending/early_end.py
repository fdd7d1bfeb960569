"""The end of a run that a script asks for, before the last planned round."""

from __future__ import annotations

import logging

import msgspec

from roundtable.common.protocol.effects import number_of
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.commit import HoldUpdates, UpdatesHeld
from roundtable.common.protocol.messages.session import EndRun, Heartbeat
from roundtable.common.protocol.transport import ASK_AGAIN_S
from roundtable.common.storage.event_log import Event
from roundtable.ps.coordinator.context import Received, RunContext
from roundtable.ps.coordinator.state.ledger import RunEnd
from roundtable.ps.coordinator.state.roster import Member

log = logging.getLogger("roundtable.ps.coordinator")


class EarlyEnd:
    """Has the run end after the same update everywhere, as a script asks for it.

    The coordinator asks the servers to begin no further update. Each answers with the first that it has not begun. The run ends
    before the latest of these. No server begins that one, whatever workers have contributed to it.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        #: By server: the incarnation of the process that has answered, and its newest answer.
        self._held: dict[int, tuple[int, UpdatesHeld]] = {}
        #: When servers were last asked.
        self._asked_at = float("-inf")
        self._tell_those_who_join()

    @property
    def ends_after(self) -> int:
        """Return the update after which the run ends; -1 if that is not decided, or not on the disk yet."""
        return self._context.ledger.ends_after if self._context.journal.unwritten_since is None else -1

    def request(self, message: Received[EndRun]) -> None:
        """Take a worker's request. The first one counts."""
        context, worker, now = self._context, message.member, message.now
        if context.ledger.run_end is None:
            at_least = max(1, min(message.body.updates, context.ledger.planned), context.ledger.committed)
            context.ledger.run_end = RunEnd(worker.name, message.body.reason, at_least)
            log.info("%s asks for the end of the run: %s", worker.name, message.body.reason)
            context.flush()
            self._ask(now)
        elif self.ends_after >= 0:
            context.mail.reply(message.route, Heartbeat(ends_after=self.ends_after))
        context.progressed_at = now

    def held(self, message: Received[UpdatesHeld]) -> None:
        """Take a server's answer. Decide once all servers have answered."""
        self._held[number_of(message.member.name)] = message.member.incarnation, message.body
        end = self._context.ledger.run_end
        if end is not None and end.updates < 0 and self._knows_servers and not self._awaited():
            self._decide(end)
            self._ask(message.now)

    def tick(self, now: float) -> None:
        """Ask servers again that have not answered."""
        if self._context.ledger.run_end is not None and now >= self._asked_at + ASK_AGAIN_S:
            self._ask(now)

    def _decide(self, end: RunEnd) -> None:
        context, ledger = self._context, self._context.ledger
        latest = max(answer.updates for _, answer in self._held.values())
        ledger.run_end = end = msgspec.structs.replace(end, updates=max(latest, end.at_least))
        self._tell_those_who_join()
        data = {"updates": end.updates, "round": ledger.end, "reason": end.reason}
        context.log.event(Event("ends", end.worker, data))
        log.info("the run ends after round %d, as %s has asked: %s", ledger.end, end.worker, end.reason)
        context.flush()
        if self.ends_after >= 0:
            for name in context.membership.names("worker"):
                context.mail.send(name, Heartbeat(ends_after=self.ends_after))

    def _tell_those_who_join(self) -> None:
        self._context.membership.introductions.ends_after = self._context.ledger.ends_after

    def _ask(self, now: float) -> None:
        """Ask the servers that have not answered, if the event log has the request or the decision."""
        end = self._context.ledger.run_end
        if end is None or not self._knows_servers or self._context.journal.unwritten_since is not None:
            return
        self._asked_at = now
        question: Body = HoldUpdates(end.at_least) if end.updates < 0 else HoldUpdates(end.updates, decided=True)
        for server in self._awaited():
            self._context.mail.send(server.name, question)

    @property
    def _knows_servers(self) -> bool:
        """Return whether it is known which servers have a part of the model. After a restart workers are to say that anew."""
        return self._context.membership.started and self._context.ledger.layout is not None

    def _awaited(self) -> list[Member]:
        """Return the servers that have not answered, or do not know the decision yet."""
        return [server for server in self._context.scheduler.servers if not server.active or not self._has_answered(server)]

    def _has_answered(self, server: Member) -> bool:
        """Return whether the process that is this server now has answered what it is to be asked now."""
        incarnation, answer = self._held.get(number_of(server.name), (-1, None))
        is_decided = self._context.ledger.ends_after >= 0
        return answer is not None and incarnation == server.incarnation and (answer.decided or not is_decided)
