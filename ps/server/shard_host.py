"""What a server decides: its shard, once workers have said which model they train, and what there is to do before and beside it.

A state machine without a socket, a thread or a clock: `handle`, `tick` and `work` return what to send.
"""

from __future__ import annotations

import logging

import msgspec

from roundtable.common.protocol.effects import BACKUP, COORDINATOR, AboutCopies, Send
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.commit import ReportAck
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


class ShardHost:
    """A server's shard, and what is known before there is one."""

    def __init__(self, context: ShardContext, source: Source | None = None, returns: bool = False) -> None:
        """`source` is the checkpoint to go on from, if any. `returns`: the shard is to come from the server's backup."""
        self.settings, self.index, self._policy = context.settings, context.index, context.policy
        self._context, self._source = context, source
        self.plans = Plans()
        self.reports = ReportQueue()
        self.checkpoint = ShardCheckpoint()
        self._progress = Progress(context.show_life)
        #: None until a worker has said which model it trains.
        self.shard: Shard | None = None
        #: Whether the shard is still to come from the backup: nobody is answered before.
        self.restoring = returns
        #: Workers that are lost: nothing of theirs counts any more.
        self.lost: set[str] = set()
        #: Backups of shards on other servers, if there are to be any.
        self._replication = (
            ReplicationManager(context.index, context.settings, context.policy, self.plans.segments, self._make_again)
            if context.settings.replicas
            else None
        )
        #: Parts of the model's file that the coordinator wants, and of which round.
        self._wanted: tuple[int, set[int]] = -1, set()

    # ---- what is known of it

    @property
    def version(self) -> int:
        """Return the number of rounds that are applied."""
        return self.shard.version if self.shard is not None else 0

    def missing(self) -> list[int]:
        """Return the micro-batches of round `version` that are not all here."""
        return self.shard.missing() if self.shard is not None else []

    def missing_later(self) -> list[list[int]]:
        """Return the same of the rounds after it."""
        return self.shard.missing_later() if self.shard is not None else []

    @property
    def traffic(self) -> Traffic:
        """Return the seconds that codecs took here."""
        return self.shard.model.dense.traffic if self.shard is not None else Traffic()

    @property
    def backed_up(self) -> list[int]:
        """Return the servers of whose shards there is a whole backup here."""
        return self._replication.backed_up if self._replication is not None else []

    @property
    def busy(self) -> bool:
        """Return True if `work` has something to do."""
        layers = self.shard is not None and self.shard.model.is_open and self.shard.model.layers.busy
        return layers or (self._replication is not None and self._replication.busy)

    @property
    def done(self) -> int:
        """Return a number that grows while what takes long goes on: sharded layers, reading and writing checkpoints, backups."""
        layers = self.shard.model.layers.steps if self.shard is not None else 0
        backup = self._replication.done if self._replication is not None else 0
        return self._context.bytes_written() + self._progress.steps + layers + backup

    # ---- events

    def handle(self, sender: str, body: Body, frames: Frames, now: float) -> list[Send]:
        """Take one message. Raises WireError if it cannot be meant; then nothing has changed."""
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
            case TakeCheckpoint():
                return self.checkpoint.ask(body, self.shard, self.done)
            case SendModel():
                known = self._wanted[1] if self._wanted[0] == body.round else set()
                self._wanted = body.round, known.union(body.parts)
                return self._send_model()
            case _:
                return self.shard.decide(body, now) if self.shard is not None else []

    def tick(self, now: float) -> list[Send]:
        """Return what is due: the report, and questions that were not answered."""
        effects = self.reports.tick(now, self.version)
        if self.shard is not None:
            effects += self.shard.tick(now)
        if self._replication is not None:
            effects += self._replication.due(now)
            if self.restoring:
                effects += self._replication.ask_back(now)
        return effects

    def work(self, now: float) -> list[Send]:
        """Do a little of what takes long."""
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
        setup = msgspec.structs.replace(setup, facts=[])  # which are the coordinator's to compare
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
        """Make the shard, without numbers. Raises WireError if there can be no such model here."""
        parts = ShardParts(self._context, self.plans, self.reports, self.checkpoint, self._progress)
        if self._policy.applies == "round":
            return SyncShard(parts, ShardModel(self._context, setup, sender, weight_versions.BUFFERS), self._replication)
        return AsyncShard(parts, ShardModel(self._context, setup, sender, async_shard.BUFFERS))

    # ---- backups of shards on other servers (ps/replication/manager.py)

    def about_copies(self, sender: str, body: AboutCopies, frames: Frames, now: float) -> list[Send]:
        """Take a message of the server that has the backup of this shard (BACKUP), or of the one whose backup is here."""
        if self._replication is None:
            raise WireError(f"{sender} keeps or has no copy here")
        effects = self._replication.handle(sender, body, frames)
        if self.restoring and (state := self._replication.returned()) is not None:
            self._return(state)
        return effects + self._go_on(now) + self._replication.due(now)

    def changed(self, backup: bool, primary: bool, now: float) -> list[Send]:
        """The server with the backup of this shard is another process, or the one whose backup is here."""
        if self._replication is not None:
            self._replication.changed(backup, primary)
            if self.shard is not None:
                self.shard.begin_backup()
        return self._go_on(now)

    def _go_on(self, now: float) -> list[Send]:
        return self.shard.go_on(now) if self.shard is not None else []

    def _make_again(self, head: StateHeader) -> ShardState:
        """Make the shard whose state is on its way from the backup."""
        self.plans.segments[:] = head.segments
        if self.shard is None:
            self.shard = self._made(head.setup, BACKUP)
            self.shard.model.is_returning = True
        return self.shard.model.state

    def _return(self, state: Incoming) -> None:
        """Go on from the state that has come from the backup."""
        head, shard = state.head, self.shard
        assert isinstance(shard, SyncShard)
        model = shard.model
        try:
            model.state.arrived(state)
        except (KeyError, RuntimeError) as error:
            raise UsageError(f"the copy of server-{self.index}'s shard, which came back, does not fit it: {error}.") from None
        model.has_returned()
        source = Source(head.round, self.settings.servers, head.setup, state, {})
        shard.resume(source)
        shard.opened(source)
        for replicated in head.replicated_rounds:
            shard.book(replicated)
        self.restoring, self.reports.may_repeat = False, True
        log.info("restored from its backup at round %d", head.round)

    # ---- what is saved

    def take_checkpoint(self) -> CheckpointData | None:
        """Return a checkpoint that is to be written, once."""
        return self.checkpoint.take()

    def written(self, status: CheckpointStatus) -> list[Send]:
        """A checkpoint is written, or could not be."""
        return self.checkpoint.written(status)

    def _send_model(self) -> list[Send]:
        """Send the coordinator the parts of the model that it wants, once all updates before that round are done and no others.
        By then every server has closed the rounds before it."""
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
