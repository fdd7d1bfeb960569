"""A server's exchange with its two neighbours about copies of shards (`ps/replication/backup.py`).

The server after this one (BACKUP) keeps a copy of this server's shard. This server keeps a copy of the shard of the server before
it, the primary server.

`ReplicationManager` is a state machine without a socket or a clock. Invariants: every forwarded update follows on the state of
the backup's copy; a shard's state is sent back only to a server that has asked for it.
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

#: Messages that a server takes from the servers before and after it.
FROM_NEIGHBOUR = (Replicate, ReplicateRows, ReplicateLayers, RoundReplicated, StateHeader, StatePart, StatePartAck, RequestState)
#: Makes the shard that the header announces, and returns the state to fill.
MakeShard = Callable[[StateHeader], ShardState]


class ReplicationManager:
    """The replication of server `index` in a run with replicas."""

    def __init__(self, index: int, settings: Settings, policy: Policy, segments: Sequence[Segment], shard: MakeShard) -> None:
        """`segments` is this server's own list of segments, which grows later."""
        self._index = index
        self._settings = settings
        self._policy = policy
        self._segments, self._make_shard = segments, shard
        #: The messages to the backup, if it has a copy or one is on its way to it, else None.
        self._primary: Primary | None = None
        #: The entries of the newest closed rounds. They go along with the shard's state.
        self._replicated: list[RoundReplicated] = []
        #: The copy of the primary server's shard, kept here.
        self._backup: Backup | None = None
        #: The state of the copy in `_backup`, on its way to the process that replaces the primary server.
        self._handed_over: Outgoing | None = None
        #: True if the replacement has asked for the state and waits until the copy has applied its complete rounds.
        self._is_wanted = False
        #: This server's own shard, on its way back from the backup.
        self._returning: Incoming | None = None
        #: The time of the last request for it: -inf before the first one, inf once it is back.
        self._asked_at = float("-inf")
        #: The number of messages with parts of states, and acknowledgements of parts.
        self._moved = 0

    # ---- the copy of this server's shard

    @property
    def has_backup(self) -> bool:
        """Return True if the backup has a copy or one is on its way to it. Then every update must be forwarded."""
        return self._primary is not None

    def begin(self, setup: Setup, round_: int, parts: Sequence[Part], pending: ReplicateLayers | None) -> None:
        """Start to send the shard's state as of `round_` to the backup. `pending` is as in `StateHeader`."""
        header = StateHeader(self._index, round_, len(parts), setup, list(self._segments), list(self._replicated), pending)
        self._primary = Primary(round_, Outgoing(header, parts))

    @property
    def reads_rows(self) -> bool:
        """Return True while rows are sent to the backup straight from their place. They must not change meanwhile."""
        return self._primary is not None and self._primary.sends_state

    def forward(self, body: Replicate | ReplicateRows | ReplicateLayers | RoundReplicated, frames: Frames, now: float) -> None:
        """Forward an update of the open round, or its end, to the backup if there is one."""
        if self._primary is not None:
            self._primary.send(body, frames, now)

    def may_close(self, round_: int) -> bool:
        """Return True if the backup has all of the round, or there is no backup."""
        return self._primary is None or self._primary.has(round_)

    def remember(self, replicated: RoundReplicated) -> None:
        """Keep the entry of a closed round."""
        self._replicated = remembered(self._replicated, replicated)

    def ask_back(self, now: float) -> list[Send]:
        """Return the request to the backup for this server's shard. It is due again after ASK_AGAIN_S without an answer."""
        if self._returning is not None or now < self._asked_at + ASK_AGAIN_S:
            return []
        self._asked_at = now
        return [Send(BACKUP, RequestState())]

    def returned(self) -> Incoming | None:
        """Return this server's shard, once, when all of it is back, else None. From then on updates are forwarded to the copy."""
        returning = self._returning
        if returning is None or not returning.complete:
            return None
        self._returning, self._asked_at = None, float("inf")
        self._primary = Primary(returning.head.round)
        return returning

    # ---- the copy of the primary server's shard

    @property
    def _primary_server(self) -> int:
        """Return the number of the server whose shard has a copy here."""
        return (self._index - 1) % self._settings.servers

    @property
    def backed_up(self) -> list[int]:
        """Return the servers whose shards have a whole copy here."""
        return [self._backup.server] if self._backup is not None and self._backup.whole else []

    @property
    def busy(self) -> bool:
        """Return True if `work` has something to apply to the copy."""
        return self._backup is not None and self._backup.busy

    def work(self) -> None:
        """Apply one contribution or tile to the copy. Hand the copy over if that was the last one and a replacement waits."""
        if self._backup is not None:
            self._backup.work()
            self._hand_over(self._backup)

    @property
    def done(self) -> int:
        """Return a number that grows during long work: parts that move, and updates of the copy's sharded layers."""
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
        """Note that the backup, or the primary server, is another process now. A new backup has no copy."""
        if primary:
            self._handed_over, self._is_wanted = None, False
        if backup:
            self._primary = None

    def due(self, now: float) -> list[Send]:
        """Return the messages that are due at `now`."""
        effects = [Send(BACKUP, body, frames) for body, frames in self._primary.due(now)] if self._primary is not None else []
        if self._handed_over is not None:
            effects += [Send(f"server-{self._primary_server}", body, frames) for body, frames in self._handed_over.due(now)]
        return effects

    def handle(self, sender: str, body: AboutCopies, frames: Frames) -> list[Send]:
        """Take a message of the backup (BACKUP) or of the primary server. Return the messages to send.

        Raises WireError if the message does not fit.
        """
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
        """Return the answer to a message of the primary server, or None."""
        number, copy = self._primary_server, self._backup
        match body:
            case StateHeader(shard=shard) if shard == number:
                if copy is None:  # a server process sends its state to another one only once
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
