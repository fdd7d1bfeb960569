"""Handles workers that leave: at their script's end, before it, or with a failure."""

from __future__ import annotations

import logging
from typing import Any

from roundtable.common.protocol.messages.session import Goodbye, Stop
from roundtable.common.protocol.transport import HEARTBEAT_S
from roundtable.common.runtime.errors import ClusterError
from roundtable.common.storage.event_log import Event, some
from roundtable.common.storage.run_files import MODEL_FILE
from roundtable.ps.coordinator.context import Received, RunContext
from roundtable.ps.coordinator.parts.failover import Failover
from roundtable.ps.coordinator.recovery import RestoredRun
from roundtable.ps.coordinator.state.roster import Member

log = logging.getLogger("roundtable.ps.coordinator")

#: After all workers have left, the coordinator waits this many seconds for the servers' last reports.
_LEFT_S = 3.0


class Departures:
    """Decides whether the run can go on without a worker, and gives the rest of its work to others."""

    def __init__(self, context: RunContext, failover: Failover, restored: RestoredRun | None) -> None:
        """Take over the failures of the run `restored`."""
        self._context = context
        self._failover = failover
        #: Workers whose model or data differ from the others'.
        self.unlike: set[str] = set()
        #: A sentence on each worker whose script has failed and without which the run goes on.
        self.failed = [] if restored is None else restored.failed
        #: How many failures `worker_failures` has admitted.
        self.admitted = 0 if restored is None else restored.admitted

    def goodbye(self, message: Received[Goodbye]) -> None:
        """Let a worker leave whose script has ended or failed."""
        context, member, goodbye, now = self._context, message.member, message.body, message.now
        if goodbye.reason and not context.is_over and not context.has_done_all(goodbye.round):
            self._script_failed(member, goodbye, now)
            return
        if not member.left:
            self._left(member, goodbye, now)
        elif goodbye.early and not member.early:  # a worker whose script had ended does not wait for the run's end
            context.mail.tell_members(context.membership.leave(member.name, early=True))
        if goodbye.early and context.policy.is_local and not context.is_over and not member.lost:
            context.mail.tell_members(context.membership.dismiss(member.name))
        if member.early:
            context.journal.promise(message.route, Stop(True))

    def note_early_leavers(self) -> None:
        """Give the work of workers whose scripts ended before the last round to others.

        Raises ClusterError if the policy needs these workers.
        """
        context = self._context
        segments = context.ledger.segments
        for worker in context.membership.workers.values():
            if not worker.left or worker.early or worker.lost or not segments or context.has_done_all(worker.ended_at):
                continue
            text = f"{worker.name} left after round {worker.ended_at} of {context.ledger.end}, as its script ended"
            if context.policy.is_local:
                raise ClusterError(
                    f"{text}, and policy {context.settings.policy} needs all workers up to the last round; run.stop(reason) "
                    "ends a run early."
                )
            context.mail.tell_members(context.membership.leave(worker.name, early=True))
            context.journal.warn(f"{text}; its work was reassigned.")

    def behind_the_end(self) -> list[Member]:
        """Return the active workers that have not reached the end of the rounds, although all rounds are done."""
        ledger = self._context.ledger
        if not ledger.planned or ledger.committed < ledger.planned:
            return []
        active = [worker for worker in self._context.membership.workers.values() if worker.active]
        return [worker for worker in active if worker.reached < ledger.end and self._can_do_without(worker)]

    def give_up(self, worker: Member, why: str, now: float, data: dict[str, str]) -> None:
        """Go on without a worker. `why` and `data` are for the event log."""
        context = self._context
        if not worker.early:
            log.warning("dropped %s; its work was reassigned: %s", worker.name, why)
            context.log.event(Event("lost", worker.name, {"why": why, "pid": worker.hello.pid, **data}))
            context.progressed_at = now
        context.mail.tell_members(context.membership.leave(worker.name, early=True))
        context.mail.send(worker.name, Stop(True))

    def all_have_left(self, now: float) -> bool:
        """Return whether all scripts have ended before the last round, and all their contributions are applied."""
        context = self._context
        membership = context.membership
        if now <= context.progressed_at + _LEFT_S or not membership.started or membership.names("worker"):
            return False
        return not membership.awaits_workers and self._are_all_here(now) and not context.scheduler.all_applied

    def _are_all_here(self, now: float) -> bool:
        """Return whether all servers have sent heartbeats lately and, after a take-over, all members have been heard."""
        servers = self._context.scheduler.servers
        silent = any(server.heartbeat.round < 0 or now > server.heard_at + 2 * HEARTBEAT_S for server in servers)
        return not silent and not self._context.membership.lost_servers and not self._failover.awaits_members(now)

    def _left(self, member: Member, goodbye: Goodbye, now: float) -> None:
        context = self._context
        member.ended_at, member.failed = -1 if goodbye.early else goodbye.round, goodbye.reason
        context.mail.tell_members(context.membership.leave(member.name, goodbye.early or bool(goodbye.reason)))
        context.log.event(Event("left", member.name, _how_left(goodbye)))
        if goodbye.reason:
            context.journal.warn(
                f"{member.name} failed after the last round, which changes nothing of the model: {goodbye.reason}"
            )
        if goodbye.changed:
            context.journal.warn(
                f"the script of {member.name} has changed {some(goodbye.changed)} after the last round: {MODEL_FILE} has the "
                "model of the last round, without that; a script can save its own with torch.save()."
            )
        context.progressed_at = now
        self.note_early_leavers()

    def _script_failed(self, worker: Member, goodbye: Goodbye, now: float) -> None:
        """Go on without a worker whose script has failed, if others can do its work and the worker may fail.

        A worker may fail if it is cut off from a server, if nothing of its work counts yet, or if `worker_failures` admits it.
        Raises ClusterError otherwise.
        """
        why = f"{worker.called} failed: {goodbye.reason}"
        if worker.early:  # a repeated Goodbye
            self._context.mail.send(worker.name, Stop(True))
            return
        is_new = self._is_beginner(worker)
        may_fail = goodbye.cut_off or is_new or self.admitted < self._context.settings.worker_failures
        if goodbye.used_kv or not may_fail or not self._can_do_without(worker):
            before = f" (before it, {some(self.failed)})" if self.failed else ""
            raise ClusterError(f"{why}{before}")
        self.admitted += not goodbye.cut_off and not is_new
        self.failed.append(why)
        kind = "cut off" if goodbye.cut_off else "beginner" if is_new else "admitted"
        self.give_up(worker, why, now, {"failed": kind})

    def _is_beginner(self, worker: Member) -> bool:
        """Return whether the ledger has no contribution of a worker.

        A worker that started with the run is no beginner if its model or data differ before any round is committed: it is unknown
        which worker is right.
        """
        ledger, first = self._context.ledger, self._context.membership.tables[0]
        began_with_others = first.epoch == 1 and worker.name in first.workers and not ledger.committed
        return worker.name not in ledger.contributors and not (began_with_others and worker.name in self.unlike)

    def _can_do_without(self, worker: Member) -> bool:
        """Return whether other workers can do the work of `worker`."""
        workers = self._context.membership.workers.values()
        others = [other for other in workers if other is not worker and not other.lost and not other.early]
        return not self._context.policy.is_local and any(other.active or self._context.is_over for other in others)


def _how_left(goodbye: Goodbye) -> dict[str, Any]:
    how: dict[str, Any] = {"round": goodbye.round}
    if goodbye.early:
        how["early"] = True
    if goodbye.reason:
        how["failed"] = goodbye.reason
    return how
