"""A server's dealings with its two neighbours about copies of shards (ps/replication/backup.py): the one after it, which
keeps a copy of its shard (BACKUP), and the one before it, whose shard has a copy here.

A state machine without a socket or a clock. Invariants: nothing is forwarded that the backup's copy does not follow on; a shard
comes back only to who has asked for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from roundtable.common.config.batch_plan import Segment
from roundtable.common.config.settings import Settings
from roundtable.common.model.layout import make_layout
from roundtable.common.policies import Policy
from roundtable.common.protocol.effects import BACKUP, AboutCopies, Send
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.replication import (
    Replicate,
    ReplicateLayers,
    ReplicateRows,
    RequestState,
    RoundReplicated,
    RoundReplicatedAck,
    StateHeader,
    StatePart,
    StatePartAck,
)
from roundtable.common.protocol.messages.setup import Setup
from roundtable.common.protocol.transport import ASK_AGAIN_S, Frames
from roundtable.ps.params.state_part import Part
from roundtable.ps.replication.backup import Backup
from roundtable.ps.replication.primary import Primary, remembered
from roundtable.ps.replication.shard_state import ShardState
from roundtable.ps.replication.state_transfer import Incoming, Outgoing

#: Makes the shard that is announced, and tells where its numbers are to go.
MakeShard = Callable[[StateHeader], ShardState]


class ReplicationManager:
    """Of server `index`, where each shard is to have a copy."""

    def __init__(self, index: int, settings: Settings, policy: Policy, segments: Sequence[Segment], shard: MakeShard) -> None:
        """`segments` are those of this server, which grow."""
        self._index = index
        self._settings = settings
        self._policy = policy
        self._segments, self._make_shard = segments, shard
        #: What the backup is told, if there is a copy or one on its way, and the newest rounds as it was told of them.
        self._primary: Primary | None = None
        self._replicated: list[RoundReplicated] = []
        #: The copy kept here, and that on its way to whoever is in the place of its server.
        self._backup: Backup | None = None
        self._handed_over: Outgoing | None = None
        #: Whether that process has asked for it, and waits until what is here is applied.
        self._is_wanted = False
        #: This shard, on its way back from the backup; and when it was asked for.
        self._returning: Incoming | None = None
        self._asked_at = float("-inf")
        self._moved = 0

    # ---- the copy of this server's shard

    @property
    def has_backup(self) -> bool:
        """Whether there is a copy, or one on its way, that is to have all that is applied here."""
        return self._primary is not None

    def begin(self, setup: Setup, round_: int, parts: Sequence[Part], pending: ReplicateLayers | None) -> None:
        """Have a copy made of the state as of `round_`; `pending` as in State."""
        header = StateHeader(self._index, round_, len(parts), setup, list(self._segments), list(self._replicated), pending)
        self._primary = Primary(round_, Outgoing(header, parts))

    @property
    def reads_rows(self) -> bool:
        """Whether rows are being sent from where they are, and so must not change."""
        return self._primary is not None and self._primary.sends_state

    def forward(self, body: Replicate | ReplicateRows | ReplicateLayers | RoundReplicated, frames: Frames, now: float) -> None:
        """Tell the backup, if there is one, of something in the open round."""
        if self._primary is not None:
            self._primary.send(body, frames, now)

    def may_close(self, round_: int) -> bool:
        """Whether nobody is to have more of that round: the backup has all of it, or there is none."""
        return self._primary is None or self._primary.has(round_)

    def remember(self, replicated: RoundReplicated) -> None:
        """A round is closed."""
        self._replicated = remembered(self._replicated, replicated)

    def ask_back(self, now: float) -> list[Send]:
        """Ask the backup for this shard; again if that was long ago and nothing has come."""
        if self._returning is not None or now < self._asked_at + ASK_AGAIN_S:
            return []
        self._asked_at = now
        return [Send(BACKUP, RequestState())]

    def returned(self) -> Incoming | None:
        """This shard, once all of it is back, and only once: from then on its copy is followed by what is forwarded."""
        returning = self._returning
        if returning is None or not returning.complete:
            return None
        self._returning, self._asked_at = None, float("inf")
        self._primary = Primary(returning.head.round)
        return returning

    # ---- the copy that is here

    @property
    def _primary_server(self) -> int:
        """The server whose shard has a copy here."""
        return (self._index - 1) % self._settings.servers

    @property
    def backed_up(self) -> list[int]:
        """Servers of whose shards there is a whole copy here."""
        return [self._backup.server] if self._backup is not None and self._backup.whole else []

    @property
    def busy(self) -> bool:
        """Whether there is something to apply to it."""
        return self._backup is not None and self._backup.busy

    def work(self) -> None:
        """Apply a little."""
        if self._backup is not None:
            self._backup.work()
            self._hand_over(self._backup)

    @property
    def done(self) -> int:
        """A number that grows while what takes long goes on: parts that move, and updates of sharded layers."""
        return self._moved + (self._backup.steps if self._backup is not None else 0)

    def _hand_over(self, copy: Backup) -> None:
        if self._is_wanted and not copy.busy:
            version, replicated, pending, parts = copy.hand_over()
            setup, segments = copy.head.setup, list(self._segments)
            self._handed_over = Outgoing(
                StateHeader(copy.server, version, len(parts), setup, segments, replicated, pending), parts
            )
            self._is_wanted = False

    # ---- events

    def changed(self, backup: bool, primary: bool) -> None:
        """The backup is another process, which has no copy yet; or the one whose shard has a copy here is."""
        if primary:
            self._handed_over, self._is_wanted = None, False
        if backup:
            self._primary = None

    def due(self, now: float) -> list[Send]:
        """What to send now."""
        effects = [Send(BACKUP, body, frames) for body, frames in self._primary.due(now)] if self._primary is not None else []
        if self._handed_over is not None:
            effects += [Send(f"server-{self._primary_server}", body, frames) for body, frames in self._handed_over.due(now)]
        return effects

    def handle(self, sender: str, body: AboutCopies, frames: Frames) -> list[Send]:
        """A message of the backup (BACKUP), or of the server before this one. Raises WireError for what does not fit."""
        self._moved += isinstance(body, StatePart | StatePartAck)
        match body:
            case RoundReplicatedAck() if sender == BACKUP and self._primary is not None:
                self._primary.handle(body)
            case StatePartAck(shard=self._index) if sender == BACKUP and self._primary is not None:
                self._primary.handle(body)
            case StateHeader(shard=self._index) if sender == BACKUP:
                if self._returning is None and float("-inf") < self._asked_at < float("inf"):
                    self._returning = Incoming(body, self._make_shard(body).put)
                return [Send(BACKUP, StatePartAck(body.shard, body.round, -1))]
            case StatePart(shard=self._index) if sender == BACKUP:
                if self._returning is not None:
                    self._returning.put(body, frames)
                return [Send(BACKUP, StatePartAck(body.shard, body.round, body.number))]
            case _ if sender == f"server-{self._primary_server}":
                answer = self._about_kept(body, frames)
                return [] if answer is None else [Send(sender, answer)]
        return []

    def _about_kept(self, body: AboutCopies, frames: Frames) -> Body | None:
        """The answer to a message of the server whose shard has a copy here, or is to have one."""
        number, copy = self._primary_server, self._backup
        match body:
            case StateHeader(shard=shard) if shard == number:
                if copy is None:  # a process sends another its state once
                    tables, sharded_layers = body.setup.tables, body.setup.sharded_layers
                    layout = make_layout(body.setup.tensors, self._settings.servers, tables, sharded_layers)
                    self._backup = Backup(number, layout, self._policy, body, self._settings.seed)
                return StatePartAck(body.shard, body.round, -1)
            case StatePart(shard=shard) if shard == number and copy is not None:
                return copy.put(body, frames)
            case Replicate() if copy is not None:
                copy.forward(body, frames)
            case ReplicateRows() if copy is not None:
                copy.forward_rows(body, frames)
            case ReplicateLayers() if copy is not None:
                copy.forward_classes(body, frames)
            case RoundReplicated() if copy is not None:
                return copy.file(body)
            case RequestState() if copy is not None and copy.whole and self._handed_over is None:
                self._is_wanted = True
                self._hand_over(copy)
            case StatePartAck(shard=shard) if shard == number and self._handed_over is not None:
                self._handed_over.got(body)
        return None
