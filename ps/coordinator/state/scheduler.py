"""Decides which worker computes what others have not done, by the members' last heartbeats."""

from __future__ import annotations

from roundtable.common.policies import Policy
from roundtable.common.protocol.messages.session import Reassign
from roundtable.common.protocol.transport import HEARTBEAT_S
from roundtable.ps.coordinator.state.ledger import Ledger
from roundtable.ps.coordinator.state.membership import Membership
from roundtable.ps.coordinator.state.roster import Member
from roundtable.ps.coordinator.state.speculation import Speculation

#: Seconds for which a server's heartbeat holds.
_BELIEVED_S = 3 * HEARTBEAT_S


class Scheduler:
    """Asks `Speculation` with what members said last."""

    def __init__(self, policy: Policy, ledger: Ledger, membership: Membership) -> None:
        self._policy = policy
        self._ledger = ledger
        self._membership = membership
        self._speculation = Speculation()

    def reassign(self, waiting: str, round_: int, now: float) -> Reassign | None:
        """Reassign a micro-batch to a worker that is idle in `round_`, if there is one for it."""
        if self._policy.is_local or not self._ledger.segments:
            return None
        first = self._ledger.committed if self._policy.applies == "push" else round_
        last = min(round_, self._ledger.segments[-1].end - 1)
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
            return None  # a later one is not for a worker that has not got its weights yet
        missing = (k for server in servers if server.heartbeat.round == open_round for k in server.heartbeat.missing)
        return self._speculation.reassign_missing(waiting, open_round, missing, count(open_round), tables, workers, now)

    def assign_orphans(self, now: float) -> list[Reassign]:
        """If pushes are applied at once, assign the micro-batches that nobody computes. No worker waits for them."""
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
        """Return whether every planned round is applied, even if only the servers say so."""
        applied = min(server.heartbeat.round for server in self.servers)
        return max(applied, self._ledger.committed) >= self._ledger.planned

    def _lacking(self) -> dict[int, set[int]]:
        """Return what servers say they lack, by round, earliest first."""
        found: dict[int, set[int]] = {}
        for heartbeat in (server.heartbeat for server in self.servers if server.heartbeat.round >= 0):
            for round_, ks in enumerate([heartbeat.missing, *heartbeat.missing_later], heartbeat.round):
                if ks:
                    found.setdefault(round_, set()).update(ks)
        return dict(sorted(found.items()))

    def _is_silent(self, now: float) -> bool:
        """Return whether a server has been silent. It may hang, and have what it seems to lack. Or it is gone."""
        return any(server.heartbeat.round < 0 or now > server.heard_at + _BELIEVED_S for server in self.servers)
