"""The server's main state machine. It makes the shard once a worker has sent the model, and handles all messages.

`ShardHost` has no socket, thread or clock: `handle`, `tick` and `work` return the messages to send.
"""

from __future__ import annotations

import logging

import msgspec

from roundtable.common.protocol.effects import BACKUP, COORDINATOR, AboutCopies, Send
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.commit import (
    AllNorms,
    CloseRound,
    HoldUpdates,
    Norms,
    ReportAck,
    RoundReady,
    UpdatesHeld,
)
from roundtable.common.protocol.messages.embedding import RowPull
from roundtable.common.protocol.messages.gradients import Pull, WeightsCredit
from roundtable.common.protocol.messages.replication import StateHeader
from roundtable.common.protocol.messages.saving import CheckpointStatus, ModelPart, SendModel, TakeCheckpoint
from roundtable.common.protocol.messages.session import MembersLost, Refused, Traffic
from roundtable.common.protocol.messages.setup import Plan, Setup, SetupReply
from roundtable.common.protocol.messages.sharded import ShardedForward
from roundtable.common.protocol.transport import Frames
from roundtable.common.runtime.errors import UsageError, WireError
from roundtable.common.runtime.failpoints import failpoint
from roundtable.ps import differences
from roundtable.ps.replication.manager import ReplicationManager
from roundtable.ps.replication.shard_state import ShardState
from roundtable.ps.replication.state_transfer import Incoming
from roundtable.ps.shard.checkpoint_writer import CheckpointData, Source
from roundtable.ps.shard.context import Plans, Progress, ShardContext
from roundtable.ps.shard.model import ShardModel
from roundtable.ps.shard.report_queue import ReportQueue
from roundtable.ps.shard.shard import Shard, ShardParts
from roundtable.ps.shard.shard_checkpoint import ShardCheckpoint
from roundtable.ps.updates import async_shard, weight_versions
from roundtable.ps.updates.async_shard import AsyncShard
from roundtable.ps.updates.sync_shard import SyncShard

log = logging.getLogger("roundtable.ps.shard")

#: Messages about the shard that a server takes from the coordinator, besides `MembersLost`.
FROM_COORDINATOR = (ReportAck, CloseRound, AllNorms, RoundReady, Norms, HoldUpdates, TakeCheckpoint, SendModel)


class ShardHost:
    """A server's shard, and the state that exists before the shard does."""

    def __init__(self, context: ShardContext, source: Source | None = None, returns: bool = False, ends_after: int = -1) -> None:
        """`source` is the checkpoint to go on from, if any. `returns`: the shard's state will come from the backup.

        `ends_after`: the run ends after so many updates, as a script has asked for; -1 if none has.
        """
        self.settings, self.index, self._policy = context.settings, context.index, context.policy
        self._context, self._source = context, source
        self.plans = Plans()
        if ends_after >= 0:
            self.plans.hold(ends_after, decided=True)
        self.reports = ReportQueue()
        self.checkpoint = ShardCheckpoint()
        self._progress = Progress(context.show_life)
        #: None until a worker has sent its model.
        self.shard: Shard | None = None
        #: True until the shard's state has arrived from the backup. The server does not read workers' messages meanwhile.
        self.restoring = returns
        #: Lost workers. The server refuses their messages.
        self.lost: set[str] = set()
        #: Replication, or None in a run without replicas.
        self._replication = (
            ReplicationManager(context.index, context.settings, context.policy, self.plans.segments, self._make_again)
            if context.settings.replicas
            else None
        )
        #: The round of which the coordinator wants parts of the model's file, and the numbers of these parts.
        self._wanted: tuple[int, set[int]] = -1, set()

    # ---- state for heartbeats

    @property
    def version(self) -> int:
        """Return the first round that is not applied in full."""
        return self.shard.version if self.shard is not None else 0

    def missing(self) -> list[int]:
        """Return the micro-batches of round `version` that have not arrived in full."""
        return self.shard.missing() if self.shard is not None else []

    def missing_later(self) -> list[list[int]]:
        """Return for each later round the micro-batches that have not arrived in full (see `Shard.missing_later`)."""
        return self.shard.missing_later() if self.shard is not None else []

    @property
    def traffic(self) -> Traffic:
        """Return the seconds that codecs took on this server."""
        return self.shard.model.dense.traffic if self.shard is not None else Traffic()

    @property
    def backed_up(self) -> list[int]:
        """Return the servers whose shards have a whole copy here."""
        return self._replication.backed_up if self._replication is not None else []

    @property
    def busy(self) -> bool:
        """Return True if `work` has something to do."""
        layers = self.shard is not None and self.shard.model.is_open and self.shard.model.layers.busy
        return layers or (self._replication is not None and self._replication.busy)

    @property
    def done(self) -> int:
        """Return a number that grows during long work: sharded layers, reading and writing checkpoints, replication."""
        layers = self.shard.model.layers.steps if self.shard is not None else 0
        backup = self._replication.done if self._replication is not None else 0
        return self._context.bytes_written() + self._progress.steps + layers + backup

    # ---- events

    def handle(self, sender: str, body: Body, frames: Frames, now: float) -> list[Send]:
        """Take one message and return the messages to send. If it raises WireError, nothing has changed."""
        if sender == COORDINATOR:
            return self._from_coordinator(body, now)
        match body:
            case Setup():
                return self._set_up(sender, body)
            case Plan():
                answer = self.plans.agree(sender, body.segment)
                return [answer, *(self.shard.plan_known() if self.shard is not None else ())]
            case _ if self.shard is not None:
                return self.shard.handle(sender, body, frames, now)
            case Pull() | RowPull() | ShardedForward() | WeightsCredit():
                return []  # the worker asks again
            case _:
                raise WireError(f"{sender} sent {type(body).__name__} before the model was agreed on")

    def _from_coordinator(self, body: Body, now: float) -> list[Send]:
        match body:
            case ReportAck():
                self.reports.acknowledged(body.seq)
                return []
            case MembersLost():
                for worker in set(body.workers) - self.lost:
                    self.lost.add(worker)
                    if self.shard is not None:
                        self.shard.forget(worker)
                return []
            case HoldUpdates():
                return self._hold(body, now)
            case TakeCheckpoint():
                return self.checkpoint.ask(body, self.shard, self.done)
            case SendModel():
                known = self._wanted[1] if self._wanted[0] == body.round else set()
                self._wanted = body.round, known.union(body.parts)
                return self._send_model()
            case _:
                return self.shard.decide(body, now) if self.shard is not None else []

    def _hold(self, body: HoldUpdates, now: float) -> list[Send]:
        """Begin no more updates than the coordinator lets this server begin, and say how many these are."""
        if self.restoring:
            return []  # it is not known yet what this server has begun; the coordinator asks again
        begun = self.shard.first_not_begun if self.shard is not None else 0
        answer = Send(COORDINATOR, UpdatesHeld(self.plans.hold(max(body.updates, begun), body.decided), self.plans.has_end))
        return [answer, *(self.shard.released(now) if self.shard is not None else ())]

    def tick(self, now: float) -> list[Send]:
        """Return the messages that are due at `now`: reports, repeated questions, and parts of states."""
        effects = self.reports.tick(now, self.version)
        if self.shard is not None:
            effects += self.shard.tick(now)
        if self._replication is not None:
            effects += self._replication.due(now)
            if self.restoring:
                effects += self._replication.ask_back(now)
        return effects

    def work(self, now: float) -> list[Send]:
        """Do a little long work, such as one tile of a sharded layer. Return the messages to send."""
        if self._replication is not None:
            self._replication.work()
        if self.shard is None:
            return []
        model = self.shard.model
        answer = model.layers.work() if model.is_open else None
        self.checkpoint.complete(model)
        effects = [] if answer is None else [Send(answer[0], *answer[1])]
        return effects + self._send_model() + self.shard.work(now)

    # ---- setting up

    def _set_up(self, sender: str, setup: Setup) -> list[Send]:
        setup = msgspec.structs.replace(setup, facts=[])  # the coordinator compares the facts
        if self.shard is None:
            if self._source is not None and setup != self._source.setup:
                return [
                    Send(sender, Refused("Setup", differences.of_setups(self._source.setup, "the checkpoint", setup, sender)))
                ]
            shard = self._made(setup, sender)
            if self._source is not None:
                shard.model.restore(self._source, self._progress)
                shard.resume(self._source)
            self.shard = shard
            if shard.model.is_open:
                shard.opened(self._source)
        elif setup != self.shard.model.setup:
            model = self.shard.model
            return [Send(sender, Refused("Setup", differences.of_setups(model.setup, model.sender, setup, sender)))]
        return [Send(sender, SetupReply(self.shard.model.lacks_weights))]

    def _made(self, setup: Setup, sender: str) -> Shard:
        """Return a new shard without weights. Raises WireError if this server cannot hold the model or make its optimizer."""
        parts = ShardParts(self._context, self.plans, self.reports, self.checkpoint, self._progress)
        if self._policy.applies == "round":
            return SyncShard(parts, ShardModel(self._context, setup, sender, weight_versions.BUFFERS), self._replication)
        return AsyncShard(parts, ShardModel(self._context, setup, sender, async_shard.BUFFERS))

    # ---- backups of shards on other servers (ps/replication/manager.py)

    def about_copies(self, sender: str, body: AboutCopies, frames: Frames, now: float) -> list[Send]:
        """Take a message of the backup (BACKUP), or of the server whose shard has a copy here. Return the messages to send.

        Raises WireError if the message does not fit.
        """
        if self._replication is None:
            raise WireError(f"{sender} sent a message about copies of shards in a run without replicas")
        effects = self._replication.handle(sender, body, frames)
        if self.restoring and (state := self._replication.returned()) is not None:
            self._return(state)
        return effects + self._go_on(now) + self._replication.due(now)

    def changed(self, backup: bool, primary: bool, now: float) -> list[Send]:
        """Note that the backup, or the server whose shard has a copy here, is another process. Return the messages to send."""
        if self._replication is not None:
            self._replication.changed(backup, primary)
            if self.shard is not None:
                self.shard.begin_backup()
        return self._go_on(now)

    def _go_on(self, now: float) -> list[Send]:
        return self.shard.go_on(now) if self.shard is not None else []

    def _make_again(self, head: StateHeader) -> ShardState:
        """Make the shard that the backup's header announces, and return the state to fill."""
        self.plans.segments[:] = head.segments
        if self.shard is None:
            self.shard = self._made(head.setup, BACKUP)
            self.shard.model.is_returning = True
        return self.shard.model.state

    def _return(self, state: Incoming) -> None:
        """Continue from the state that has arrived from the backup. Raises UsageError if it does not fit."""
        head, shard = state.head, self.shard
        assert isinstance(shard, SyncShard)
        model = shard.model
        try:
            model.state.arrived(state)
        except (KeyError, RuntimeError) as error:
            raise UsageError(f"the copy of server-{self.index}'s shard from its backup does not fit it: {error}.") from None
        model.has_returned()
        source = Source(head.round, self.settings.servers, head.setup, state, {})
        shard.resume(source)
        shard.opened(source)
        for replicated in head.replicated_rounds:
            shard.book(replicated)
        self.restoring, self.reports.may_repeat = False, True
        log.info("restored from its backup at round %d", head.round)

    # ---- saving

    def take_checkpoint(self) -> CheckpointData | None:
        """Return the complete checkpoint to write, once, else None."""
        return self.checkpoint.take()

    def written(self, status: CheckpointStatus) -> list[Send]:
        """Return a message that tells the coordinator whether the checkpoint was written."""
        return self.checkpoint.written(status)

    def _send_model(self) -> list[Send]:
        """Return messages with the parts of the model that the coordinator wants, once the shard is exactly at their round.

        By then every server has closed the rounds before, so sharded layers may finish their updates.
        """
        round_, numbers = self._wanted
        shard = self.shard
        if not numbers or shard is None or round_ != shard.version or not shard.at_border or not shard.model.is_open:
            return []
        layers, parts = shard.model.layers, shard.model.parts
        if layers:
            layers.begin_update()
            if layers.version != layers.accepted:
                return []
        self._wanted = -1, set()
        failpoint("uploading", round_)
        known = sorted(number for number in numbers if number < len(parts))
        return [Send(COORDINATOR, ModelPart(round_, number), shard.model.frames_of(parts[number])) for number in known]
