"""Decisions about a round that all servers must share: which micro-batches count, and the norms for clipping.

A server asks the coordinator, and keeps the decision for a coordinator that takes over the run.
"""

from __future__ import annotations

from roundtable.common.protocol.effects import COORDINATOR, Send
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.commit import AllNorms, CloseRound, Norms, RoundReady
from roundtable.common.protocol.transport import ASK_AGAIN_S


class RoundDecisions:
    """The decisions about the open round and the one before, and the question that was asked last."""

    def __init__(self) -> None:
        self._decided: list[CloseRound | AllNorms] = []
        self._asked: Body | None = None
        self._asked_at = float("-inf")

    def remember(self, decision: CloseRound | AllNorms) -> None:
        """Keep a decision about the open round, for a coordinator that takes over the run."""
        known = [one for one in self._decided if one.round >= decision.round - 1 and one != decision]
        self._decided = [*known, decision]

    def repeat(self, question: RoundReady | Norms) -> list[Send]:
        """Return messages to the coordinator with the decision on another server's question, if this server knows it."""
        kind = CloseRound if isinstance(question, RoundReady) else AllNorms
        return [Send(COORDINATOR, one) for one in self._decided if isinstance(one, kind) and one.round == question.round]

    def ask(self, question: RoundReady | Norms | None, now: float) -> list[Send]:
        """Return the message to the coordinator, none if the same question was asked less than ASK_AGAIN_S ago."""
        if question is None or (question == self._asked and now < self._asked_at + ASK_AGAIN_S):
            return []
        self._asked, self._asked_at = question, now
        return [Send(COORDINATOR, question)]

    def begin_round(self) -> None:
        """Forget the question of the previous round."""
        self._asked, self._asked_at = None, float("-inf")
