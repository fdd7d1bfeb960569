"""Stops on request: the whole run after a signal, and single members that were told to stop."""

from __future__ import annotations

import logging

from roundtable.common.protocol.messages.session import Heartbeat
from roundtable.common.runtime.errors import Stopped
from roundtable.common.storage.checkpoint import finished, round_of
from roundtable.common.storage.event_log import Event
from roundtable.ps.coordinator.context import RunContext
from roundtable.ps.coordinator.parts.checkpoints import CheckpointDriver
from roundtable.ps.coordinator.parts.model import ModelCollector
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
