"""The primary's side of replication: the messages to its backup (`ps/replication/backup.py`)."""

from __future__ import annotations

from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.replication import (
    Replicate,
    ReplicateLayers,
    ReplicateRows,
    RoundReplicated,
    RoundReplicatedAck,
    StatePartAck,
)
from roundtable.common.protocol.transport import SEND_AGAIN_S, Frames
from roundtable.ps.replication.state_transfer import Outgoing

#: Entries of at least this many rounds are kept, so that a replacement server knows which micro-batches were left out.
_REMEMBERED = 64


def remembered(before: list[RoundReplicated], new: RoundReplicated) -> list[RoundReplicated]:
    """Return `before` with `new`, without rounds that the coordinator has and that are more than 64 rounds old."""
    return [replicated for replicated in before if replicated.round >= min(new.reported, new.round - _REMEMBERED)] + [new]


class Primary:
    """The messages to the backup of one shard, until the backup has them."""

    def __init__(self, round_: int, state: Outgoing | None = None) -> None:
        """Start with a copy as of `round_` at the backup. If `state` is given, the backup has to get that state first."""
        #: The backup has all rounds before this one.
        self._kept = round_
        #: The initial state, until it has arrived.
        self._state = state
        #: All messages of the open round.
        self._open: list[tuple[Body, Frames]] = []
        #: When a message of the open round was sent last.
        self._sent_at = float("inf")
        #: Messages to send now.
        self._outbox: list[tuple[Body, Frames]] = []

    def send(self, body: Replicate | ReplicateRows | ReplicateLayers | RoundReplicated, frames: Frames, now: float) -> None:
        """Queue a message of the open round."""
        self._open.append((body, frames))
        self._outbox.append((body, frames))
        self._sent_at = now

    @property
    def sends_state(self) -> bool:
        """Return True if the initial state has not arrived in full."""
        return self._state is not None

    def has(self, round_: int) -> bool:
        """Return True if the backup has all of a round, so that the round may be closed."""
        return self._kept > round_

    def handle(self, body: RoundReplicatedAck | StatePartAck) -> None:
        """Take an acknowledgement of the backup."""
        if isinstance(body, StatePartAck):
            if self._state is not None:
                self._state.got(body)
                self._state = None if self._state.done else self._state
        elif self._open and isinstance(replicated := self._open[-1][0], RoundReplicated) and replicated.round == body.round:
            self._kept, self._open, self._outbox, self._sent_at = body.round + 1, [], [], float("inf")

    def due(self, now: float) -> list[tuple[Body, Frames]]:
        """Return the messages to the backup that are due at `now`.

        All messages of the open round are due again SEND_AGAIN_S after the last one, if the backup has not acknowledged the
        round.
        """
        out = list(self._state.due(now)) if self._state is not None else []
        if now >= self._sent_at + SEND_AGAIN_S:
            self._outbox, self._sent_at = list(self._open), now
        out += self._outbox
        self._outbox = []
        return out
