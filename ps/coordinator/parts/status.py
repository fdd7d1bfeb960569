"""Tells users how the run goes on: progress, losses, and which processes it waits for."""

from __future__ import annotations

import logging
from collections import Counter

from roundtable.common.protocol.messages.session import Heartbeat
from roundtable.common.protocol.rejections import Rejections
from roundtable.common.runtime.errors import printable
from roundtable.common.storage.event_log import Event, StatusRow, some
from roundtable.ps.coordinator.context import RunContext
from roundtable.ps.coordinator.parts.model import ModelCollector
from roundtable.ps.coordinator.state.roster import Member

log = logging.getLogger("roundtable.ps.coordinator")

#: Seconds between two lines on progress in the log, for users without the web page.
TELL_S = 10.0
#: The warning about a worker that computed different gradients for the same micro-batch.
_UNSTEADY = (
    "{who} has computed its first micro-batch twice, from the same weights, samples and seed, and the gradient of '{name}' "
    "differs: the script carries something from batch to batch (a hidden state, a counter, a generator of its own), or its "
    "arithmetic is not deterministic. So the result depends on who computes what. Have such state in a buffer of the model."
)


class StatusReporter:
    """Writes the state of the run to the log and the event log."""

    def __init__(self, context: RunContext, model: ModelCollector, rejections: Rejections, now: float) -> None:
        self._context = context
        self._model = model
        self._rejections = rejections
        #: When progress was last reported.
        self._reported_at = now
        #: By kind: the rejected messages that were last reported.
        self._reported_rejected: Counter[str] = Counter()
        #: (incarnation of a worker, of a server that it cannot reach) of the reported pairs.
        self._reported_unreached: set[tuple[int, int]] = set()

    def tick(self, now: float) -> None:
        """Every TELL_S, report the round and the loss, and the processes that the run waits for."""
        if now < self._reported_at + TELL_S:
            return
        self._reported_at = now
        ledger, event_log = self._context.ledger, self._context.log
        if missing := self._missing(now):
            log.info("waits for %s", missing)
            event_log.event(Event("waiting", "coordinator", {"for": missing}))
        if ledger.planned:
            loss = ledger.recent("loss")
            text = "no loss logged: call run.log(loss=loss)" if loss is None else f"loss {loss.value:.4f}"
            log.info("round %d of %d, %s", ledger.committed, ledger.planned, text)
        if (rejected := self.rejected()) != self._reported_rejected:
            self._reported_rejected = rejected
            event_log.event(Event("refused", "coordinator", dict(rejected)))

    def write(self) -> None:
        """Write the status of all members to the event log."""
        membership = self._context.membership
        waits_for = self.whom_all_wait_for() if membership.started else ""
        for member in membership.members.values():
            heartbeat = member.heartbeat
            state = "lost" if member.lost else "done" if member.left else heartbeat.state or "starting"
            waits = waits_for if state == "waiting" and member.hello.role == "worker" else ""
            self._context.log.status(StatusRow(member.name, state, heartbeat.round, waits, heartbeat.rate))

    def note_losses(self, now: float) -> None:
        """Report lost members. The launcher of a hanging process reads the event log, and may end the process."""
        context, membership = self._context, self._context.membership
        forgotten = {member.name for member in membership.newly_forgotten}
        for name, why, pid in membership.newly_lost:
            if name in forgotten:
                context.log.event(Event("forgotten", name, {"why": why}))
                continue
            then = "its work was reassigned" if name in membership.workers else "waiting for its replacement"
            if context.is_over and name in membership.workers:
                membership.workers[name].failed, then = why, "all rounds are done, so nobody needs it"
            log.warning("%s died: %s; %s", name, why, then)
            context.log.event(Event("lost", name, {"why": why, "pid": pid}))
            context.progressed_at = now
        membership.newly_lost.clear()
        if forgotten:
            self._forget()

    def note_heartbeat(self, member: Member, heartbeat: Heartbeat) -> None:
        """Warn about problems in a member's new heartbeat: gradients that differ, and servers that it cannot reach."""
        if heartbeat.unsteady and not member.heartbeat.unsteady:
            self._context.journal.warn(_UNSTEADY.format(who=member.who, name=printable(heartbeat.unsteady)))
        for number in heartbeat.unreached:
            server = self._context.membership.servers.get(f"server-{number}")
            if server is not None and (pair := (member.incarnation, server.incarnation)) not in self._reported_unreached:
                self._reported_unreached.add(pair)
                self._context.journal.warn(_cannot_reach(member, server))

    def whom_all_wait_for(self) -> str:
        """Return the names of the processes that the open round waits for.

        These are workers with work left or, if there are none, the servers that have not applied the round.
        """
        membership = self._context.membership
        if unreached := self._unreached():
            return f"a connection ({unreached})"
        if gone := membership.lost_servers:
            return f"a replacement of {some(gone)}"
        busy = [name for name in membership.names("worker") if membership.members[name].heartbeat.state != "waiting"]
        if busy:
            return some(busy)
        round_ = self._context.ledger.committed
        return some([name for name in membership.names("server") if membership.members[name].heartbeat.round <= round_])

    def rejected(self) -> Counter[str]:
        """Return by kind how many messages this process and all members have rejected."""
        told = (member.heartbeat.refused for member in self._context.membership.members.values())
        return sum((Counter(counts) for counts in told), Counter(self._rejections.counts))

    def _missing(self, now: float) -> str:
        """Return the names of the processes that the run waits for, or '' while something moves."""
        context = self._context
        if not context.membership.started:
            return context.membership.missing()
        if awaited := context.membership.awaited():
            return awaited
        if self._model.is_complete and (there := context.membership.names("worker")):
            return f"the script of {some(there)}, which goes on after the last round"
        if now < context.progressed_at + TELL_S or not (names := self.whom_all_wait_for()):
            return ""
        return f"{names}; no progress for {now - context.progressed_at:.0f} s"

    def _forget(self) -> None:
        """Forget workers that have joined and never took part, except for their names."""
        gone = self._context.membership.newly_forgotten
        log.warning("%s connected but sent nothing else, and is forgotten", some([member.name for member in gone]))
        for member in gone:
            self._context.mail.routes.pop(member.name, None)
            self._context.journal.forget(member)
            self._context.log.status(StatusRow(member.name, "lost", -1, ""))
        gone.clear()

    def _unreached(self) -> str:
        """Return a text on the workers that cannot reach servers, or '' if all can."""
        membership = self._context.membership
        servers, active = membership.servers, membership.names("worker")
        workers = [worker for name in active if (worker := membership.members[name]).heartbeat.unreached]
        pairs = [(w, servers[name]) for w in workers for n in w.heartbeat.unreached if (name := f"server-{n}") in servers]
        return some([_cannot_reach(worker, server) for worker, server in pairs])


def _cannot_reach(worker: Member, server: Member) -> str:
    address = printable(server.hello.address)
    return f"{worker.called} cannot reach {server.called} at {address}: see its --listen and --advertise"
