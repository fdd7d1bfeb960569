"""Decides from the members' last heartbeats which worker computes micro-batches that others have not done."""

from __future__ import annotations

from roundtable.common.policies import Policy
from roundtable.common.protocol.messages.session import Reassign
from roundtable.common.protocol.transport import HEARTBEAT_S
from roundtable.ps.coordinator.state.ledger import Ledger
from roundtable.ps.coordinator.state.membership import Membership
from roundtable.ps.coordinator.state.roster import Member
from roundtable.ps.coordinator.state.speculation import Speculation

#: A server's heartbeat is trusted for this many seconds.
_BELIEVED_S = 3 * HEARTBEAT_S


class Scheduler:
    """Calls `Speculation` with the members' last heartbeats."""

    def __init__(self, policy: Policy, ledger: Ledger, membership: Membership) -> None:
        self._policy = policy
        self._ledger = ledger
        self._membership = membership
        self._speculation = Speculation()

    def reassign(self, waiting: str, round_: int, now: float) -> Reassign | None:
        """Return the reassignment of a micro-batch to `waiting`, a worker that is idle in `round_`, or None."""
        if self._policy.is_local or not self._ledger.segments:
            return None
        first = self._ledger.committed if self._policy.applies == "push" else round_
        last = min(round_, self._ledger.end - 1)
        workers, tables = self._membership.workers, self._membership.tables
        count = self._ledger.micro_batches
        if self._policy.applies == "push":
            return self._speculation.reassign(waiting, range(first, last + 1), count, tables, workers, now, self._lacking())
        found = self._speculation.reassign(waiting, range(first, last + 1), count, tables, workers, now)
        if found is not None or self._is_silent(now):
            return found
        servers = self.servers
        open_round = min(server.heartbeat.round for server in servers)
        if open_round > round_:
            return None  # `waiting` has no weights of a later round yet
        missing = (k for server in servers if server.heartbeat.round == open_round for k in server.heartbeat.missing)
        return self._speculation.reassign_missing(waiting, open_round, missing, count(open_round), tables, workers, now)

    def assign_orphans(self, now: float) -> list[Reassign]:
        """If each push is applied at once, return assignments of the micro-batches that no worker computes."""
        if self._policy.applies != "push" or not self._ledger.segments or self._is_silent(now):
            return []
        of_all = self._membership.tables, self._membership.workers
        return self._speculation.assign_orphans(self._lacking(), self._ledger.micro_batches, *of_all, now)

    @property
    def servers(self) -> list[Member]:
        """Return the servers that have a part of the model."""
        owners = self._ledger.layout.owners() if self._ledger.layout is not None else [0]
        return [self._membership.members[f"server-{owner}"] for owner in owners]

    @property
    def all_applied(self) -> bool:
        """Return whether every planned round is applied, by the ledger or by the servers' heartbeats."""
        applied = min(server.heartbeat.round for server in self.servers)
        return max(applied, self._ledger.committed) >= self._ledger.planned

    def _lacking(self) -> dict[int, set[int]]:
        """Return by round, earliest first, the micro-batches that servers lack by their heartbeats."""
        found: dict[int, set[int]] = {}
        for heartbeat in (server.heartbeat for server in self.servers if server.heartbeat.round >= 0):
            for round_, ks in enumerate([heartbeat.missing, *heartbeat.missing_later], heartbeat.round):
                if ks:
                    found.setdefault(round_, set()).update(ks)
        return dict(sorted(found.items()))

    def _is_silent(self, now: float) -> bool:
        """Return whether a server has been silent. Then its last heartbeat does not prove that it lacks micro-batches."""
        return any(server.heartbeat.round < 0 or now > server.heard_at + _BELIEVED_S for server in self.servers)
