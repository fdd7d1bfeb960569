"""Messages that are sent again until they are answered, and contributions among them until they are acknowledged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from common.messages import Body, ClassAck, ClassPush, RowAck, RowPush
from common.wire import SEND_AGAIN_S, Frames

B = TypeVar("B", bound=Body, covariant=True)


@dataclass
class Sent(Generic[B]):
    """A message to a server, and when it was sent last."""

    server: str
    body: B
    frames: Frames
    sent_at: float
    #: Seconds after which it is sent again.
    patience_s: float = SEND_AGAIN_S


def due(messages: Iterable[Sent[Body]], now: float, at_most_s: float = SEND_AGAIN_S) -> list[Sent[Body]]:
    """Those to send again now. Each time twice as long is waited, up to `at_most_s` seconds: a server may be at it for long."""
    again = [sent for sent in messages if now >= sent.sent_at + sent.patience_s]
    for sent in again:
        sent.sent_at, sent.patience_s = now, min(2 * sent.patience_s, at_most_s)
    return again


class Pushes:
    """Contributions that servers have not acknowledged."""

    def __init__(self) -> None:
        self.sent: list[Sent[RowPush | ClassPush]] = []

    def acknowledged(self, server: str, ack: RowAck | ClassAck) -> None:
        """One server has got one."""
        whose = server, ack.round, ack.lo, ack.hi
        self.sent = [s for s in self.sent if (s.server, s.body.round, s.body.lo, s.body.hi) != whose]

    def of_round(self, round_: int) -> set[int]:
        """Micro-batches of `round_` that were pushed and may not have arrived everywhere."""
        return {k for sent in self.sent if sent.body.round == round_ for k in range(sent.body.lo, sent.body.hi)}
