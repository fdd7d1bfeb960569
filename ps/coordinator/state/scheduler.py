"""Who is to compute what others have not done, as far as the coordinator knows from what members have told it."""

from __future__ import annotations

from roundtable.common.policies import Policy
from roundtable.common.protocol.messages.session import Reassign
from roundtable.common.protocol.transport import BEAT_S
from roundtable.ps.coordinator.state.ledger import Ledger
from roundtable.ps.coordinator.state.membership import Membership
from roundtable.ps.coordinator.state.roster import Member
from roundtable.ps.coordinator.state.speculation import Speculation

#: Seconds for which a server's word of what it misses is believed.
_BELIEVED_S = 3 * BEAT_S


class Scheduler:
    """Asks `Speculation` with the members' last words."""

    def __init__(self, policy: Policy, ledger: Ledger, membership: Membership) -> None:
        self._policy = policy
        self._ledger = ledger
        self._membership = membership
        self._takeover = Speculation()

    def lease(self, waiting: str, round_: int, now: float) -> Reassign | None:
        """Something for a worker that waits in `round_`."""
        if self._policy.is_local or not self._ledger.segments:
            return None
        first = self._ledger.committed if self._policy.applies == "push" else round_
        last = min(round_, self._ledger.segments[-1].end - 1)
        workers, tables = self._membership.workers, self._membership.tables
        count = self._ledger.micro_batches
        if self._policy.applies == "push":
            return self._takeover.lease(waiting, range(first, last + 1), count, tables, workers, now, self._lacking())
        lease = self._takeover.lease(waiting, range(first, last + 1), count, tables, workers, now)
        if lease is not None or self._is_silent(now):
            return lease
        servers = self.servers
        open_round = min(server.beat.round for server in servers)
        if open_round > round_:
            return None  # a later one is not for a worker that has not got its weights yet
        missing = (k for server in servers if server.beat.round == open_round for k in server.beat.missing)
        return self._takeover.lease_missing(waiting, open_round, missing, count(open_round), tables, workers, now)

    def deal(self, now: float) -> list[Reassign]:
        """Where pushes are applied at once: what nobody does, without anybody waiting for it."""
        if self._policy.applies != "push" or not self._ledger.segments or self._is_silent(now):
            return []
        of_all = self._membership.tables, self._membership.workers
        return self._takeover.deal(self._lacking(), self._ledger.micro_batches, *of_all, now)

    @property
    def servers(self) -> list[Member]:
        """Those that take part in rounds."""
        owners = self._ledger.layout.owners() if self._ledger.layout is not None else [0]
        return [self._membership.members[f"server-{owner}"] for owner in owners]

    @property
    def all_applied(self) -> bool:
        """Whether every planned round is applied, be it only by what servers say of themselves."""
        applied = min(server.beat.round for server in self.servers)
        return max(applied, self._ledger.committed) >= self._ledger.planned

    def _lacking(self) -> dict[int, set[int]]:
        """What servers say they have not got, by round, earliest first, as far as they say so."""
        found: dict[int, set[int]] = {}
        for beat in (server.beat for server in self.servers if server.beat.round >= 0):
            for round_, ks in enumerate([beat.missing, *beat.missing_later], beat.round):
                if ks:
                    found.setdefault(round_, set()).update(ks)
        return dict(sorted(found.items()))

    def _is_silent(self, now: float) -> bool:
        """Whether a server may hang, for then what is missing there may have arrived; or is gone, so that there is nothing to be
        sent to it."""
        return any(server.beat.round < 0 or now > server.heard_at + _BELIEVED_S for server in self.servers)
