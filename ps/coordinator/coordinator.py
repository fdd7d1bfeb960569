"""The coordinator process: a loop that moves messages between its socket and its parts. It needs no torch.

`parts/` has one file for each task of the coordinator. `state/` has the state machines that the parts share.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from roundtable.common.config.settings import Settings
from roundtable.common.protocol.effects import number_of
from roundtable.common.protocol.envelope import Envelope
from roundtable.common.protocol.flow_limits import Inflow, Standing
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.commit import AllNorms, CloseRound, Mean, Metrics, Norms, Report, RoundReady, UpdatesHeld
from roundtable.common.protocol.messages.saving import CheckpointStatus, ModelPart, Recomputed
from roundtable.common.protocol.messages.session import (
    AskPast,
    Collective,
    EndRun,
    Goodbye,
    Heartbeat,
    KeepState,
    Reassign,
    RequestWork,
    Stop,
)
from roundtable.common.protocol.messages.setup import Plan, Setup
from roundtable.common.protocol.rejections import Rejections
from roundtable.common.protocol.transport import HEARTBEAT_S, ForeignRun, Frames, receive
from roundtable.common.runtime.errors import PsError, Stopped, WireError
from roundtable.common.runtime.failpoints import arm, failpoint
from roundtable.common.runtime.watchdog import Watchdog
from roundtable.common.storage import disk_alarm
from roundtable.common.storage.event_log import Event
from roundtable.ps.coordinator.context import Received, new_context
from roundtable.ps.coordinator.ending.deadline import Deadline
from roundtable.ps.coordinator.ending.early_end import EarlyEnd
from roundtable.ps.coordinator.ending.farewell import Farewell, RestartRun
from roundtable.ps.coordinator.ending.stopping import Stopping
from roundtable.ps.coordinator.parts.checkpoints import CheckpointDriver
from roundtable.ps.coordinator.parts.collectives import Collectives
from roundtable.ps.coordinator.parts.departures import Departures
from roundtable.ps.coordinator.parts.failover import Failover
from roundtable.ps.coordinator.parts.joining import Joining
from roundtable.ps.coordinator.parts.model import ModelCollector
from roundtable.ps.coordinator.parts.planning import Planning
from roundtable.ps.coordinator.parts.status import StatusReporter
from roundtable.ps.coordinator.parts.summary import RunSummary
from roundtable.ps.coordinator.recovery import RestoredRun
from roundtable.ps.coordinator.results import summarized_run

log = logging.getLogger("roundtable.ps.coordinator")

#: Milliseconds between two ticks.
TICK_MS = 50
#: Seconds after which the status of all members is written to the event log again.
_STATUS_S = 0.25

Handler = Callable[[Received[Any]], None]


class Coordinator:
    """One run's coordinator. `run` is the loop."""

    def __init__(
        self,
        sock: zmq.Socket[bytes],
        settings: Settings,
        run_dir: Path,
        restored: RestoredRun | None = None,
        recovers: bool = False,
        late_s: float | None = None,
    ) -> None:
        """Begin a new run, or continue the run `restored`.

        If this coordinator `recovers` the run, it replaces a coordinator that has died, and the other processes stay. Otherwise
        all processes of the run restart. If `late_s` is given, the run may be over: its processes have `late_s` seconds to ask.
        """
        now = time.monotonic()
        self._sock = sock
        self.context = context = new_context(sock, settings, run_dir, restored, recovers, now)
        arm("coordinator", run_dir)
        self._rejections = Rejections(log)
        #: Watches connections, once the loop runs.
        self._inflow: Inflow | None = None
        self.failover = Failover(context)
        self.model = ModelCollector(context)
        self.departures = Departures(context, self.failover, restored)
        self.planning = Planning(context, self.model, self.departures)
        self.checkpoints = CheckpointDriver(context, self.departures, now)
        self.stopping = Stopping(context, self.checkpoints, self.model)
        self.early_end = EarlyEnd(context)
        self.status = StatusReporter(context, self.model, self._rejections, now)
        self.deadline = Deadline(context, self.model, self.departures, self.checkpoints, self.status)
        self.summary = RunSummary(context, self.model, self.departures, self.planning, self.status)
        self.collectives = Collectives(context, self.model, self.summary)
        seen = {member.hello.pid for member in restored.members.values()} if restored is not None else set()
        self.joining = Joining(context, self.model, seen)
        self._handlers = self._all_handlers()
        #: When each member's heartbeat was last answered, by name.
        self._answered_at: dict[str, float] = {}
        self._status_at = now
        self.farewell = Farewell(context, self.failover, self.stopping, self._listen, late_s)
        if restored is not None and recovers:
            self._take_over(restored, now)
        else:
            context.log.event(Event("started", "coordinator", {"run": context.head.run, "pid": os.getpid()}))
        disk_alarm.raise_alarm("")  # the alarm of the coordinator before
        context.flush()

    def _take_over(self, restored: RestoredRun, now: float) -> None:
        context = self.context
        self.failover.take_over(restored, self.joining.is_dead, now)
        self.summary.recover(restored)
        self.planning.recover(restored, now)
        self.model.recover(restored)
        over = Stop(True) if summarized_run(context.run_dir) == context.run else None
        self.farewell.stop = restored.stop or over
        log.info("goes on with run %s after %d rounds", context.run, context.ledger.committed)
        data = {"run": restored.head.run, "pid": os.getpid(), "rounds": context.ledger.committed}
        context.log.event(Event("recovered", "coordinator", data))

    # ---- the loop

    def run(self) -> None:
        """Run the loop until the run ends, and write its results.

        Raises RestartRun, Stopped, or the PsError that says why the run failed.
        """
        if self.farewell.stop is not None:
            self.farewell.end_as_decided(self.farewell.stop)
            return
        context, poller = self.context, zmq.Poller()
        poller.register(self._sock, zmq.POLLIN)
        self._inflow = Inflow(self._sock, self._rejections)
        watchdog = Watchdog(context.settings.stack_dump_after, self._progress, self.status.whom_all_wait_for)
        try:
            ticked_at = time.monotonic()
            while True:
                poller.poll(0 if self.model.hashes else TICK_MS)
                self.drain()
                self.model.tick(time.monotonic())
                if (now := time.monotonic()) >= ticked_at + TICK_MS / 1000:
                    ticked_at = now
                    self._inflow.look(now)
                    self.tick(now)
                    if self.is_finished():
                        break
            self.summary.write()
        except RestartRun as error:
            self.farewell.restart(str(error))
            raise
        except PsError as error:
            context.log.event(Event("failed", "coordinator", {"reason": str(error)}))
            self.farewell.say(Stop(False, str(error)))
            raise
        except Stopped as error:
            self.farewell.say(Stop(False, f"the run was told to stop: {error}.", on_request=True))
            raise
        finally:
            self._inflow.close()
            watchdog.stop()
        context.log.event(Event("finished", "coordinator", {}))
        self.farewell.say(Stop(True))

    def drain(self) -> None:
        """Handle the messages that have come in, for about HEARTBEAT_S at most."""
        until = time.monotonic() + HEARTBEAT_S
        while time.monotonic() < until:
            frames: list[zmq.Frame] | None = []
            standing = Standing.STRANGER
            try:
                frames = receive(self._sock)
                if frames is None:
                    break
                standing = self._take(frames)
            except WireError as error:
                self._rejections.note(error, time.monotonic())
            if self._inflow is not None and frames:
                self._inflow.took(frames[1:], standing)
        if self.context.journal.is_urgent:
            self.context.flush()

    def _listen(self) -> None:
        """Wait for messages, and handle them."""
        self._sock.poll(TICK_MS)
        self.drain()

    def _take(self, frames: list[zmq.Frame]) -> Standing:
        """Handle one message. Return the sender's standing. Raises WireError if the message is rejected."""
        if len(frames) < 2:
            raise WireError("a message has no header", "malformed")
        try:
            envelope = self.context.mail.stamp.open(frames[1].buffer, joining=True)
        except ForeignRun as error:
            if error.run.partition(".")[0] == self.context.run:  # the sender has not heard of the restart
                self.context.mail.reply(frames[0].bytes, Stop(False, "the run has restarted.", restart=True), error.run)
            raise
        self.handle(frames[0].bytes, envelope, frames[2:])
        if envelope.run:
            return Standing.MEMBER
        return Standing.JOINING if self.context.membership.knows(envelope.incarnation) else Standing.STRANGER

    def tick(self, now: float) -> None:
        """Do everything that is due. Raises RestartRun, Stopped or ClusterError if the run ends."""
        context = self.context
        context.mail.tell_members(context.membership.tick(now, self.joining.is_dead))
        self.stopping.let_leave(now)
        self.status.note_losses(now)
        self.stopping.tick(now)
        self.early_end.tick(now)
        if context.membership.broken and self.model.needs_servers():
            raise RestartRun(context.membership.broken)
        context.enter_rows(now)
        if now >= self._status_at + _STATUS_S:
            self._status_at = now
            if not self.failover.awaits_members(now):
                for reassignment in context.scheduler.assign_orphans(now):
                    self._reassign(reassignment)
            self.status.write()
            context.flush()
        elif context.journal.is_due(now):
            context.flush()
        self.status.tick(now)
        self.checkpoints.tick(now, self.stopping.awaits_checkpoint)
        self.model.tick(now)
        self.collectives.tick(now)
        self.deadline.tick(now)

    def is_finished(self) -> bool:
        """Return whether all workers have left, the ledger is complete, and the model is written."""
        membership, ledger = self.context.membership, self.context.ledger
        if not membership.started or membership.names("worker"):
            return False
        if ledger.layout is None:
            return any(worker.left for worker in membership.workers.values())
        if not self.model.is_complete or self.context.may_go_on:
            return False
        return self.checkpoints.scheduler.has_ended(ledger.committed) or bool(membership.lost_servers)

    # ---- messages

    def handle(self, route: bytes, envelope: Envelope, frames: Frames) -> None:
        """Answer one message. Raises WireError if it is rejected."""
        now = time.monotonic()
        if not envelope.run:
            self._hello(route, envelope, now)
            return
        context = self.context
        member = context.membership.members.get(envelope.sender)
        if member is None or member.incarnation != envelope.incarnation:
            why = f"{envelope.sender} is not a member of the run; it joins again as another."
            context.mail.reply(route, Stop(False, why, restart=True))
            raise WireError(f"{envelope.sender} is not a member of this run, or is another process of that name", "sender")
        body = envelope.read()
        handler = self._handlers[member.hello.role].get(type(body))
        if handler is None:
            raise WireError(f"the coordinator has no use for {type(body).__name__} from {member.name}")
        if self.farewell.stop is not None:
            context.mail.routes[member.name] = route
            context.mail.reply(route, self.farewell.stop)
            return
        if member.lost:
            context.mail.reply(route, member.fence())
            return
        if member.name not in context.mail.routes:
            self.joining.know_again(route, member, now)
        context.membership.heard(member, now)
        context.mail.routes[member.name] = route
        handler(Received(route, member, body, frames, envelope.epoch, now))

    def _hello(self, route: bytes, envelope: Envelope, now: float) -> None:
        hello = envelope.read_hello()
        if self.farewell.stop is None:
            self.joining.hello(route, hello, envelope.incarnation, now)
        else:
            self.farewell.answer(route, envelope.incarnation)

    def _all_handlers(self) -> dict[str, dict[type[Body], Handler]]:
        """Return by role of the sender and type of message the method that handles it."""
        servers: dict[type[Body], Handler] = {
            Heartbeat: self._heartbeat,
            Report: self._report,
            RoundReady: self.failover.decide,
            Norms: self.failover.decide,
            CloseRound: self._decided,
            AllNorms: self._decided,
            UpdatesHeld: self.early_end.held,
            CheckpointStatus: self.checkpoints.note_status,
            ModelPart: self.model.take_part,
        }
        workers: dict[type[Body], Handler] = {
            Heartbeat: self._heartbeat,
            Setup: self.planning.set_up,
            Plan: self.planning.plan,
            RequestWork: self._request_work,
            Mean: self._mean,
            Metrics: self.summary.log_metrics,
            Recomputed: self.model.recomputed,
            EndRun: self.early_end.request,
            Collective: self.collectives.at,
            AskPast: self.planning.past,
            KeepState: self.planning.keep_state,
            Goodbye: self.departures.goodbye,
        }
        return {"server": servers, "worker": workers}

    def _heartbeat(self, message: Received[Heartbeat]) -> None:
        context, member, heartbeat, now = self.context, message.member, message.body, message.now
        if (news := context.membership.news(member, message.epoch, now)) is not None:
            context.journal.promise(message.route, news)
        if _progress_of(heartbeat) != _progress_of(member.heartbeat):
            context.progressed_at = now
        self.status.note_heartbeat(member, heartbeat)
        context.membership.heartbeat(member.name, heartbeat, now)
        if now >= self._answered_at.get(member.name, 0.0) + HEARTBEAT_S / 2:  # heartbeats with news come much more often
            self._answered_at[member.name] = now
            leaves = member.name in self.stopping.dismissed
            context.mail.send(member.name, Heartbeat(leaves=leaves, ends_after=self.early_end.ends_after))

    def _report(self, message: Received[Report]) -> None:
        context = self.context
        context.journal.promise(message.route, context.ledger.report(number_of(message.member.name), message.body))
        failpoint("reported", message.body.version)

    def _decided(self, message: Received[CloseRound] | Received[AllNorms]) -> None:
        self.context.mail.to_servers(self.context.decisions.decided(message.body))

    def _request_work(self, message: Received[RequestWork]) -> None:
        if self.failover.awaits_members(message.now):
            return
        reassignment = self.context.scheduler.reassign(message.member.name, message.body.round, message.now)
        if reassignment is not None:
            self._reassign(reassignment)

    def _mean(self, message: Received[Mean]) -> None:
        self.context.mail.reply(message.route, self.context.ledger.mean(message.body))

    def _reassign(self, body: Reassign) -> None:
        data = {"round": body.round, "k": body.micro_batch, "from": body.owner}
        self.context.log.event(Event("reassigned", body.to, data))
        self.context.mail.send(body.to, body)
        self.context.mail.send(body.owner, body)

    def _progress(self) -> float | None:
        """Return when something last moved, or None before the run starts. The watchdog's thread calls this."""
        return self.context.progressed_at if self.context.membership.started else None


def _progress_of(heartbeat: Heartbeat) -> tuple[int, int, int, str]:
    return heartbeat.round, heartbeat.micro_batch, heartbeat.progress, heartbeat.state
