"""Takes the model and the plan of rounds from the workers."""

from __future__ import annotations

import time

import msgspec

from roundtable.common.config.batch_plan import Segment
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.session import AskPast, KeepState, Refused
from roundtable.common.protocol.messages.setup import Accepted, Plan, PlanReply, Request, Setup, SetupReply
from roundtable.common.protocol.tickets import seal
from roundtable.common.runtime.errors import ClusterError
from roundtable.common.storage.event_log import Event
from roundtable.ps.coordinator.context import Received, RunContext
from roundtable.ps.coordinator.parts.departures import Departures
from roundtable.ps.coordinator.parts.model import ModelCollector
from roundtable.ps.coordinator.recovery import RestoredRun
from roundtable.ps.coordinator.state.roster import Member

#: Bytes of scripts' states that are kept, for going on from any of the newest checkpoints.
_MOST_STATE_BYTES = 64 << 20


class Planning:
    """Makes sure that all workers have one model and one plan."""

    def __init__(self, context: RunContext, model: ModelCollector, departures: Departures) -> None:
        self._context = context
        self._model = model
        self._departures = departures
        #: The number of rounds planned when the last plan came.
        self._planned = 0
        #: The last warning about workers that can get no micro-batch.
        self._spare_reported = ""
        #: When the first plan was made, or None before.
        self.training_since: float | None = None

    def recover(self, restored: RestoredRun, now: float) -> None:
        """Take over the plans of the coordinator before."""
        self._planned = self._context.ledger.planned
        if restored.planned_at is not None:
            self.training_since = restored.planned_at + now - time.time()

    def set_up(self, message: Received[Setup]) -> None:
        """Take the first worker's model, or compare a worker's model with the known one."""
        membership, worker = self._context.membership, message.member
        answer = self._context.ledger.set_up(message.body, worker.who)
        if isinstance(answer, SetupReply):
            first = next(iter(membership.names("worker")), worker.name)
            answer = SetupReply(worker.name == first, membership.members[first].who)
        self._answer(message.route, worker, answer)

    def plan(self, message: Received[Plan]) -> None:
        """Take a new plan, or compare a worker's plan with the known one."""
        context, worker, plan = self._context, message.member, message.body
        trusted = context.membership.starters | context.ledger.contributors
        may_define = worker.name in trusted or trusted.isdisjoint(context.membership.names("worker"))
        answer = context.ledger.plan(plan.segment, plan.facts, worker.who, may_define)
        if isinstance(answer, PlanReply):
            answer = msgspec.structs.replace(answer, seal=seal(context.head.key, plan.segment))
        if answer is not None:
            self._answer(message.route, worker, answer)
        if context.ledger.planned > self._planned:
            self._note_plan(plan.segment, message.now)
        self._planned = context.ledger.planned  # fewer once a script has asked for the run's end

    def past(self, message: Received[AskPast]) -> None:
        """Tell a worker which loops over batches lie behind its script."""
        self._context.mail.reply(message.route, self._context.ledger.past(message.body.round))

    def keep_state(self, message: Received[KeepState]) -> None:
        """Keep the state of the scripts. All scripts have the same, so the newest counts."""
        body, states = message.body, self._context.ledger.states
        states[body.round] = body.value
        while sum(map(len, states.values())) > _MOST_STATE_BYTES:
            del states[min(states)]
        self._context.journal.promise(message.route, Accepted(Request.STATE, body.id), urgent=True)

    def _note_plan(self, segment: Segment, now: float) -> None:
        context = self._context
        self._planned, context.progressed_at = context.ledger.planned, now
        self.training_since = self.training_since or now
        merges = {"merges": True} if context.policy.is_local else {}
        context.log.event(Event("plan", "coordinator", {"rounds": self._planned, "epochs": context.ledger.passes, **merges}))
        spare = segment.spare_workers(context.settings.workers) if context.settings.policy in ("sync", "backup") else ""
        if spare and spare != self._spare_reported:
            self._spare_reported = spare
            context.journal.warn(spare)
        if context.ledger.committed < self._planned:
            self._train_on()

    def _train_on(self) -> None:
        """Go on with more rounds than were known. Raises ClusterError if a worker failed in between."""
        self._model.discard()
        for worker in self._context.membership.workers.values():
            if worker.left and worker.failed:
                raise ClusterError(f"{worker.name} failed: {worker.failed}")
            worker.failed = ""
        self._context.membership.train_on()
        self._departures.note_early_leavers()

    def _answer(self, route: bytes, worker: Member, answer: Body) -> None:
        """Promise a worker the answer to its model or plan. Note the worker if the answer is a refusal."""
        if isinstance(answer, Refused):
            self._departures.unlike.add(worker.name)
        self._context.journal.promise(route, answer, urgent=True)
