"""Messages that are repeated until they are answered, and contributions until they are acknowledged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.embedding import RowAck, RowPush
from roundtable.common.protocol.messages.sharded import LayerAck, LayerPush
from roundtable.common.protocol.transport import SEND_AGAIN_S, Frames

B = TypeVar("B", bound=Body, covariant=True)


@dataclass
class Sent(Generic[B]):
    """A message to a server."""

    server: str
    body: B
    frames: Frames
    #: When the message was sent last, in seconds; -inf: send it at once.
    sent_at: float
    #: Seconds after which the message is sent again.
    patience_s: float = SEND_AGAIN_S


def due(messages: Iterable[Sent[Body]], now: float, at_most_s: float = SEND_AGAIN_S) -> list[Sent[Body]]:
    """Return the messages to send again now.

    Each time the wait doubles, up to `at_most_s` seconds, because a server may need long for an answer.
    """
    again = [sent for sent in messages if now >= sent.sent_at + sent.patience_s]
    for sent in again:
        sent.sent_at, sent.patience_s = now, min(2 * sent.patience_s, at_most_s)
    return again


def again(messages: Iterable[Sent[B]], server: str) -> list[Sent[B]]:
    """Return the messages to this server, and have all of them sent again at once."""
    found = [sent for sent in messages if sent.server == server]
    for sent in found:
        sent.sent_at, sent.patience_s = float("-inf"), SEND_AGAIN_S
    return found


class RetransmitQueue:
    """Contributions that servers have not acknowledged. If servers may be replaced, it also keeps those of the newest round."""

    def __init__(self, may_be_replaced: bool) -> None:
        self.sent: list[Sent[RowPush | LayerPush]] = []
        self._may_be_replaced = may_be_replaced
        #: If servers may be replaced: acknowledged contributions of the newest round.
        self._repeatable: list[Sent[RowPush | LayerPush]] = []

    def add(self, new: Sent[RowPush | LayerPush]) -> None:
        """Add a contribution that is sent now. Its round shows that all servers have closed the rounds before."""
        self._repeatable = [sent for sent in self._repeatable if sent.body.round >= new.body.round]
        self.sent.append(new)

    def acknowledged(self, server: str, ack: RowAck | LayerAck) -> None:
        """Note that a server has acknowledged a contribution."""
        whose = server, ack.round, ack.lo, ack.hi
        known = [(s, (s.server, s.body.round, s.body.lo, s.body.hi) == whose) for s in self.sent]
        self.sent = [s for s, is_meant in known if not is_meant]
        if self._may_be_replaced:
            self._repeatable += [s for s, is_meant in known if is_meant]

    def replaced(self, server: str) -> list[Sent[RowPush | LayerPush]]:
        """Return the contributions that a server needs again, at once, because it is a new process."""
        self.sent += [sent for sent in self._repeatable if sent.server == server]
        self._repeatable = [sent for sent in self._repeatable if sent.server != server]
        return again(self.sent, server)

    def of_round(self, round_: int) -> set[int]:
        """Return the micro-batches of `round_` that were pushed but not acknowledged by all servers."""
        return {k for sent in self.sent if sent.body.round == round_ for k in range(sent.body.lo, sent.body.hi)}
