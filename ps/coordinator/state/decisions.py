"""Decisions that all servers must share: which micro-batches are in a round, and how gradients are clipped.

A decision on a round never changes once it is given. It is not written to the disk. A coordinator that takes over gets decisions
from the servers that know them, before all servers can have asked for a new one (`RoundReady`).
"""

from __future__ import annotations

from typing import Any

from roundtable.common.policies import Policy
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.commit import AllNorms, CloseRound, Norms, RoundReady
from roundtable.ps.coordinator.state.ledger import Ledger

#: Decisions on this many rounds are kept for servers that ask again.
_REMEMBERED = 16


class RoundDecisions:
    """Makes the decisions on rounds, and keeps the newest ones."""

    def __init__(self, policy: Policy, ledger: Ledger) -> None:
        self._policy = policy
        self._ledger = ledger
        #: By round and server: the micro-batches that have arrived.
        self._ready: dict[int, dict[int, list[int]]] = {}
        #: By decided round: the micro-batches that count.
        self._closed: dict[int, list[int]] = {}
        #: By round and server: the norms that the server has sent.
        self._norms: dict[int, dict[int, list[tuple[int, int, float]]]] = {}
        #: By decided round: the norms of all servers.
        self._all_norms: dict[int, AllNorms] = {}

    def round_ready(self, server: int, message: RoundReady) -> list[tuple[int, Body]]:
        """Policy `backup`: decide a round once enough micro-batches have arrived at all servers. Return (server, answer)."""
        if message.round in self._closed:
            return [(server, CloseRound(message.round, self._closed[message.round]))]
        count = self._ledger.micro_batches(message.round)
        if self._ledger.layout is None or not all(k < count for k in message.micro_batches):
            return []
        sets = self._ready.setdefault(message.round, {})
        sets[server] = message.micro_batches
        owners = self._ledger.layout.owners()
        everywhere = set.intersection(*(set(sets.get(owner, ())) for owner in owners))
        if not count or len(everywhere) < max(1, count - self._policy.may_leave_out):
            return []
        return self.decided(CloseRound(message.round, sorted(everywhere)))

    def norms(self, server: int, message: Norms) -> list[tuple[int, Body]]:
        """Clipping: join a round's norms once every server with a part of the model has sent its own. Return (server, answer)."""
        if self._ledger.layout is None or self._ledger.segment_of(message.round) is None:
            return []
        if message.round in self._all_norms:
            return [(server, self._all_norms[message.round])]
        parts = self._norms.setdefault(message.round, {})
        parts.setdefault(server, message.norms)
        _forget(self._norms)
        owners = {chunk.server for chunk in self._ledger.layout.chunks}
        if self._ledger.layout.tables or self._ledger.layout.sharded_layers:
            owners.update(self._ledger.layout.owners())
        if not owners <= parts.keys():
            return []
        return self.decided(AllNorms(message.round, sorted(norm for part in parts.values() for norm in part)))

    def decided(self, decision: CloseRound | AllNorms) -> list[tuple[int, Body]]:
        """Keep a decision of this coordinator, or of one before it. Return (server, decision) for all servers."""
        if isinstance(decision, CloseRound):
            self._closed[decision.round] = decision.micro_batches
            self._ready.pop(decision.round, None)
            _forget(self._closed)
        else:
            self._all_norms[decision.round] = decision
            self._norms.pop(decision.round, None)
            _forget(self._all_norms)
        return [(owner, decision) for owner in self._ledger.layout.owners()] if self._ledger.layout is not None else []


def _forget(decisions: dict[int, Any]) -> None:
    for round_ in sorted(decisions)[:-_REMEMBERED]:
        del decisions[round_]
