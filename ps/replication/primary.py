"""A shard's side of replication: what its backup is sent (ps/replication/backup.py)."""

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

#: Rounds of which it is remembered what was left out.
_REMEMBERED = 64


def remembered(before: list[RoundReplicated], new: RoundReplicated) -> list[RoundReplicated]:
    """The newest rounds with one more: those that the coordinator may not have been told of, and some for what they left out."""
    return [replicated for replicated in before if replicated.round >= min(new.reported, new.round - _REMEMBERED)] + [new]


class Primary:
    """A shard's side: what its backup is sent. Without one nobody keeps a copy, and rounds are closed all the same."""

    def __init__(self, round_: int, state: Outgoing | None = None) -> None:
        """The backup has a copy as of `round_`, or has yet to get this state."""
        #: Every round below is kept.
        self._kept = round_
        self._state = state
        #: What the backup must have of the open round, and when it was last sent all of it; what is to be sent now.
        self._open: list[tuple[Body, Frames]] = []
        self._sent_at = float("inf")
        self._outbox: list[tuple[Body, Frames]] = []

    def send(self, body: Replicate | ReplicateRows | ReplicateLayers | RoundReplicated, frames: Frames, now: float) -> None:
        """Tell the backup of something in the open round."""
        self._open.append((body, frames))
        self._outbox.append((body, frames))
        self._sent_at = now

    @property
    def sends_state(self) -> bool:
        """Whether the state that the copy begins with is still on its way."""
        return self._state is not None

    def has(self, round_: int) -> bool:
        """Whether the backup has all of a round, so that it may be closed."""
        return self._kept > round_

    def handle(self, body: RoundReplicatedAck | StatePartAck) -> None:
        """An answer of the backup."""
        if isinstance(body, StatePartAck):
            if self._state is not None:
                self._state.got(body)
                self._state = None if self._state.done else self._state
        elif self._open and isinstance(replicated := self._open[-1][0], RoundReplicated) and replicated.round == body.round:
            self._kept, self._open, self._outbox, self._sent_at = body.round + 1, [], [], float("inf")

    def due(self, now: float) -> list[tuple[Body, Frames]]:
        """What to send the backup now. Only what the last message of a round calls for is sent again."""
        out = list(self._state.due(now)) if self._state is not None else []
        if now >= self._sent_at + SEND_AGAIN_S:
            self._outbox, self._sent_at = list(self._open), now
        out += self._outbox
        self._outbox = []
        return out
