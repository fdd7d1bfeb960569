"""Stops on request: the whole run after a signal, single members that were told to stop, and the end that a script asks for."""

from __future__ import annotations

import logging

import msgspec

from roundtable.common.protocol.effects import number_of
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.commit import HoldUpdates, UpdatesHeld
from roundtable.common.protocol.messages.session import EndRun, Heartbeat
from roundtable.common.protocol.transport import ASK_AGAIN_S
from roundtable.common.runtime.errors import Stopped
from roundtable.common.storage.checkpoint import finished, round_of
from roundtable.common.storage.event_log import Event
from roundtable.ps.coordinator.context import Received, RunContext
from roundtable.ps.coordinator.parts.checkpoints import CheckpointDriver
from roundtable.ps.coordinator.parts.model import ModelCollector
from roundtable.ps.coordinator.state.ledger import RunEnd
from roundtable.ps.coordinator.state.roster import Member

log = logging.getLogger("roundtable.ps.coordinator")


class Stopping:
    """Asks for a checkpoint before the run stops, or before a member leaves that the run needs."""

    def __init__(self, context: RunContext, checkpoints: CheckpointDriver, model: ModelCollector) -> None:
        self._context = context
        self._checkpoints = checkpoints
        self._model = model
        #: The signal that told the run to stop, or 0.
        self.signal = 0
        self._is_stopping = False
        #: The deadline of the checkpoint that the run or a member waits for, or None.
        self._until: float | None = None
        #: Workers that were told to stop and may leave.
        self.dismissed: set[str] = set()

    @property
    def awaits_checkpoint(self) -> bool:
        """Return whether the run or a member waits for a checkpoint before it stops."""
        return self._until is not None

    def request(self, number: int) -> None:
        """Stop the run after the round in progress, because of signal `number`. Raises Stopped if it comes a second time.

        If all processes of a host are told to stop, a launcher among them sends another signal. It changes nothing.
        """
        if self.signal == number:
            raise Stopped(number, self._how_far())
        self.signal = self.signal or number

    def tick(self, now: float) -> None:
        """After a signal, raise Stopped once the run may stop."""
        if not self.signal:
            return
        if not self._is_stopping:
            self._is_stopping, self._until = True, None
            log.warning("is told to stop: ends the round in progress and makes a checkpoint; a second signal stops it at once")
            self._context.log.event(Event("stopping", "coordinator", {"seconds": self._context.settings.stop_timeout}))
        if self._is_saved(now):
            raise Stopped(self.signal, self._how_far())

    def let_leave(self, now: float) -> None:
        """Let members that were told to stop leave.

        A worker leaves at once if others stay and do its work. Other members leave after a checkpoint, because the run may have
        to go on from it. If the run itself must stop, all leave with it.
        """
        members = self._context.membership.members.values()
        asking = [member for member in members if member.active and member.heartbeat.leaves and member.name not in self.dismissed]
        if self.signal or not asking:
            self._until = self._until if self.signal else None
            return
        spared = [member for member in asking if self._is_spared(member)]
        if len(spared) < len(asking) and self._is_saved(now):
            spared = asking
        for member in spared:
            self._dismiss(member, now)

    def _dismiss(self, member: Member, now: float) -> None:
        context = self._context
        log.info("%s was told to stop, and leaves", member.called)
        context.progressed_at = now
        if member.hello.role == "worker" and not context.policy.is_local:
            self.dismissed.add(member.name)
            context.mail.send(member.name, Heartbeat(leaves=True))
        else:
            context.mail.tell_members(context.membership.dismiss(member.name))
            context.mail.send(member.name, member.fence())

    def _is_spared(self, member: Member) -> bool:
        """Return whether the run goes on without `member` as if it had never been there."""
        if member.hello.role == "server":
            return not self._model.needs_servers()
        stays = any(other.active and not other.heartbeat.leaves for other in self._context.membership.workers.values())
        return self._context.is_over or (stays and not self._context.policy.is_local)

    def _is_saved(self, now: float) -> bool:
        """Ask for a checkpoint of the end of the round in progress. Return whether it is complete, or cannot be in time."""
        context, scheduler = self._context, self._checkpoints.scheduler
        if self._until is None:
            self._until = now + context.settings.stop_timeout
            scheduler.hurry(now)
        is_trained = context.membership.started and context.ledger.planned > 0
        is_made = scheduler.is_made or (scheduler.in_progress is None and scheduler.newest == context.ledger.committed)
        cannot = not is_trained or not context.settings.checkpoint_every or context.membership.broken or scheduler.failure
        return bool(is_made or cannot or now > self._until)

    def _how_far(self) -> str:
        """Return a text on how many rounds are done and from which checkpoint the run can go on."""
        settings, done, newest = self._context.settings, self._context.ledger.committed, finished(self._context.run_dir)
        saved = f"with a checkpoint of round {round_of(newest[-1])}" if newest else "without a checkpoint"
        why = ""
        if not self._checkpoints.scheduler.is_made and done:
            merges = f", which policy {settings.policy} makes at merges only" if self._context.policy.is_local else ""
            why = f", as none was made in time{merges}" if settings.checkpoint_every else ", as --checkpoint-every 0 says"
        return f"it has done {done} rounds, {saved}{why}"


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
