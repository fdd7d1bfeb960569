"""Who takes part: rendezvous, signs of life, and the table of shares that each membership epoch has.

A state machine without a socket or a clock. Invariants:

- a name belongs to one incarnation at a time;
- nobody is welcomed before every expected process is there;
- tables have growing epochs, and a new one holds only from a round on that nobody has begun.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from common.errors import ClusterError
from common.leases import Table, shares
from common.messages import Beat, Body, Hello, Refused, Tables, Welcome
from common.policies import Policy
from common.settings import Settings
from common.wire import GONE_S

#: Seconds that processes have to join before the run is given up.
JOIN_S = 120.0
#: Seconds between two looks at whether shares should follow the measured speeds.
RESHARE_S = 2.0
#: A server that has been silent for so long has died, if one is there to take its place; else the newcomer is refused after
#: so many seconds.
_DEAD_S = 1.5
_TAKEN_S = 6.0
#: A new table holds from so many rounds after the newest one known, and so many seconds at the speed of the last ones, for
#: the news to get everywhere first. Where it does not, micro-batches are missing or done twice, and are leased again.
_LEAD_ROUNDS = 2
_LEAD_S = 1.5


@dataclass
class Member:
    """A process that has joined. `left` is set when it said goodbye, `lost` when it fell silent."""

    name: str
    hello: Hello
    incarnation: int
    heard_at: float
    beat: Beat = field(default_factory=Beat)
    #: Since when it has been computing the micro-batch of `beat.at`.
    since: float = 0.0
    left: bool = False
    lost: bool = False

    @property
    def active(self) -> bool:
        return not self.left and not self.lost


class Membership:
    """All members of a run, by name."""

    def __init__(self, settings: Settings, policy: Policy, run: str, now: float, run_dir: str = "", resume: int = -1) -> None:
        """The run directory is `run_dir`, and the run goes on from the snapshot of round `resume` in it, if that is not -1."""
        self.settings = settings
        self.run = run
        #: The same, as people know it: without what tells it from itself before all began anew.
        self._name = run.partition(".")[0]
        self._run_dir = run_dir
        self._resume = resume
        #: Why the run must go on from its newest snapshot, once it must.
        self.broken = ""
        #: Since when new processes have been waiting for a place that seems to be taken.
        self._newcomers: dict[int, float] = {}
        self.members: dict[str, Member] = {}
        #: Those of them that are servers, and those that are workers.
        self.servers: dict[str, Member] = {}
        self.workers: dict[str, Member] = {}
        self._incarnations: dict[int, Member] = {}
        self.started = False
        self.tables: list[Table] = []
        #: Workers that fell silent, until whoever tells of it has taken note.
        self.newly_lost: list[str] = []
        self._policy = policy
        self._began_at = now
        self._reshared_at = now
        #: The newest round that a worker was in at the last look, and rounds per second since the one before.
        self._newest = 0
        self._pace = 0.0

    def restore(self, members: Iterable[Member], tables: list[Table]) -> None:
        """Take over the members and tables of a coordinator that is gone. All are to tell anew where they are."""
        for member in members:
            self.members[member.name] = self._of(member.hello.role)[member.name] = self._incarnations[member.incarnation] = member
        self.tables, self.started = tables, bool(tables)
        self._newest = self._newest_round()

    def names(self, role: str) -> list[str]:
        """Members of `role` that are still part of the run, by number."""
        return sorted((name for name, member in self._of(role).items() if member.active), key=number_of)

    def _of(self, role: str) -> dict[str, Member]:
        return self.servers if role == "server" else self.workers

    def hello(self, hello: Hello, incarnation: int, now: float) -> tuple[Member | None, list[tuple[str, Body]]]:
        """A process asks to join: the member it is (None if refused), and what to answer to whom ('' is the asker)."""
        member = self._incarnations.get(incarnation)
        if member is not None:
            member.heard_at = now
            return member, [("", self._answer(member))]
        expected = self.settings.servers if hello.role == "server" else self.settings.workers
        there = self._of(hello.role)
        if hello.role == "server" and self.started and (old := self._place_of(hello)) is not None:
            if now - old.heard_at > _DEAD_S:
                self.broken = f"{old.name} (process {old.hello.pid} on {old.hello.host}) has died and begins anew."
            if self.broken or now - self._newcomers.setdefault(incarnation, now) < _TAKEN_S:
                return None, [("", Beat())]
        if f"{hello.role}-{hello.index}" in there:
            return None, [("", Refused("Hello", f"there is a {hello.role}-{hello.index} in run {self._name} already."))]
        if hello.role == "server" and len(there) >= expected:
            reason = f"run {self._name} has all of its {expected} servers already; the coordinator's --servers says how many."
            return None, [("", Refused("Hello", reason))]
        if hello.role == "worker" and len(there) >= expected and self._policy.is_local:
            reason = f"policy {self.settings.policy} cannot take in more than the {expected} workers it began with."
            return None, [("", Refused("Hello", reason))]
        number = hello.index
        if number is None:
            number = next(n for n in range(len(there) + 1) if f"{hello.role}-{n}" not in there)
        if hello.role == "server" and number >= expected:
            return None, [
                ("", Refused("Hello", f"server {number} is one too many: run {self._name} has {expected} servers, from 0."))
            ]
        member = Member(f"{hello.role}-{number}", hello, incarnation, now)
        self.members[member.name] = there[member.name] = self._incarnations[incarnation] = member
        if self.started:
            self._new_table()
            return member, [("", self._answer(member)), *self._to_workers(Tables(self.tables))]
        if len(self.members) < self.settings.servers + self.settings.workers or self._missing():
            return member, [("", Beat())]
        self.started = True
        workers = self.names("worker")
        self.tables = [Table(1, 0, workers, [1] * len(workers))]
        return member, [(m.name, self._answer(m)) for m in self.members.values()]

    def _place_of(self, hello: Hello) -> Member | None:
        """Whose place a new server would take: that of its number, else of the one that has been silent for longest."""
        if hello.index is not None:
            return self.servers.get(f"server-{hello.index}")
        return min(self.servers.values(), key=lambda member: member.heard_at)

    def _answer(self, member: Member) -> Body:
        if not self.started:
            return Beat()
        servers = [self.members[name].hello.address for name in self.names("server")]
        return Welcome(member.name, self.run, self.settings, servers, self.tables, self._run_dir, self._resume)

    def beat(self, name: str, beat: Beat, now: float) -> None:
        member = self.members[name]
        member.heard_at = now
        if (beat.round, beat.at) != (member.beat.round, member.beat.at):
            member.since = now
        member.beat = beat

    def tick(self, now: float) -> list[tuple[str, Body]]:
        """Messages that are due: new tables. Marks silent members as lost, and notes them in `newly_lost`.

        Raises ClusterError where the run cannot start or go on.
        """
        if not self.started:
            if now - self._began_at > JOIN_S:
                raise ClusterError(f"{self._missing()} did not join within {JOIN_S:.0f} s.")
            return []
        lost = [m for m in self.members.values() if m.active and now - m.heard_at > GONE_S]
        for member in lost:
            if member.hello.role == "server" or self._policy.is_local:
                self.broken = (
                    f"{member.name} (process {member.hello.pid} on {member.hello.host}) has been silent for {GONE_S:.0f} s."
                )
            member.lost = True
            self.newly_lost.append(member.name)
        if lost and not self.names("worker") and not any(m.left for m in self.members.values()):
            raise ClusterError(f"no worker is left: {', '.join(m.name for m in lost)} fell silent for {GONE_S:.0f} s.")
        if lost and self.names("worker"):
            self._new_table()
            return self._to_workers(Tables(self.tables))
        if now - self._reshared_at > RESHARE_S and not self._policy.is_local:
            newest = self._newest_round()
            self._pace = (newest - self._newest) / (now - self._reshared_at)
            self._newest, self._reshared_at = newest, now
            if self._speeds_changed():
                self._new_table()
                return self._to_workers(Tables(self.tables))
        return []

    def _to_workers(self, body: Body) -> list[tuple[str, Body]]:
        return [(name, body) for name in self.names("worker")]

    def _missing(self) -> str:
        roles = [("server", self.settings.servers), ("worker", self.settings.workers)]
        parts = [f"{n - len(self.names(role))} of {n} {role}s" for role, n in roles if len(self.names(role)) < n]
        return " and ".join(parts)

    # ---- shares

    def _weights(self, workers: list[str]) -> list[int]:
        """Measured samples per second, relative to the fastest, in hundredths; unmeasured ones count as the mean."""
        rates = [self.members[w].beat.rate for w in workers]
        known = [rate for rate in rates if rate > 0]
        if not known:
            return [1] * len(workers)
        mean = sum(known) / len(known)
        return [max(1, round(100 * (rate or mean) / max(known))) for rate in rates]

    def _speeds_changed(self) -> bool:
        """Whether shares by the speeds measured now would move a micro-batch."""
        workers = self.names("worker")
        table = self.tables[-1]
        if workers != table.workers or any(self.members[w].beat.rate <= 0 for w in workers):
            return False
        count = -(-self.settings.global_batch // self.settings.micro_batch)
        return shares(count, self._weights(workers)) != shares(count, table.weights)

    def _newest_round(self) -> int:
        return max([member.beat.round for member in self.workers.values()], default=0)

    def _new_table(self) -> None:
        workers = self.names("worker")
        lead = _LEAD_ROUNDS + round(self._pace * _LEAD_S)
        first = max(self._newest_round() + lead, self.tables[-1].from_round + 1)
        self.tables = [*self.tables[-7:], Table(self.tables[-1].epoch + 1, first, workers, self._weights(workers))]


def number_of(name: str) -> int:
    """3 for 'worker-3'."""
    return int(name.rpartition("-")[2])
