"""What only all servers together can decide about a round: asked of the coordinator, and remembered for the next coordinator."""

from __future__ import annotations

from roundtable.common.protocol.effects import COORDINATOR, Send
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.commit import AllNorms, CloseRound, Norms, RoundReady
from roundtable.common.protocol.transport import ASK_AGAIN_S


class RoundDecisions:
    """Decisions about the open round and the one before, and the question that is on its way."""

    def __init__(self) -> None:
        self._decided: list[CloseRound | AllNorms] = []
        self._asked: Body | None = None
        self._asked_at = float("-inf")

    def remember(self, decision: CloseRound | AllNorms) -> None:
        """Keep a decision about the open round, for a coordinator that takes over the run."""
        known = [one for one in self._decided if one.round >= decision.round - 1 and one != decision]
        self._decided = [*known, decision]

    def repeat(self, question: RoundReady | Norms) -> list[Send]:
        """Return what was decided about another server's question."""
        kind = CloseRound if isinstance(question, RoundReady) else AllNorms
        return [Send(COORDINATOR, one) for one in self._decided if isinstance(one, kind) and one.round == question.round]

    def ask(self, question: RoundReady | Norms | None, now: float) -> list[Send]:
        """Ask the coordinator, unless the same was asked a moment ago."""
        if question is None or (question == self._asked and now < self._asked_at + ASK_AGAIN_S):
            return []
        self._asked, self._asked_at = question, now
        return [Send(COORDINATOR, question)]

    def begin_round(self) -> None:
        """The open round is another one."""
        self._asked, self._asked_at = None, float("-inf")
