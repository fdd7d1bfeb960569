"""Decides which processes may join, and under which number."""

from __future__ import annotations

import itertools

from roundtable.common.config.settings import Settings
from roundtable.common.network.addresses import is_loopback
from roundtable.common.policies import Policy
from roundtable.common.protocol.messages.session import Heartbeat, Hello, Refused
from roundtable.common.storage.event_log import some
from roundtable.ps.coordinator.state.roster import Member, Roster

#: A process that asks for a place that seems taken is refused after this many seconds.
_TAKEN_S = 6.0
#: At most this many late workers may have sent a Hello and nothing else. Others wait until some are proven or lost.
MOST_UNPROVEN = 64
#: At most this many times the expected number of workers take part at once,
_MOST_TIMES = 4
#: plus this many.
_MOST_MORE = 64
#: A run gives at most this many names to workers.
MOST_NAMES = 100_000
#: A text on missing processes has at most this many characters.
LONGEST_TEXT = 600


class Admission:
    """Answers processes that ask to join and are not members."""

    def __init__(self, settings: Settings, policy: Policy, roster: Roster, run: str) -> None:
        """`run` is the run's name for users."""
        self._settings = settings
        self._policy = policy
        self._roster = roster
        self._run = run
        #: By incarnation, oldest first: since when the process has waited for a place that seems taken.
        self._newcomers: dict[int, float] = {}
        #: Names of workers that never took part and are not members any more. No other worker gets these names.
        self._forgotten: set[str] = set()
        #: The number of workers that have sent a Hello and nothing else.
        self._unproven = 0
        #: All worker numbers below this one are taken.
        self._lowest_free = 0

    def tick(self, now: float) -> None:
        """Forget processes that asked long ago."""
        while self._newcomers and now > next(iter(self._newcomers.values())) + 2 * _TAKEN_S:
            del self._newcomers[next(iter(self._newcomers))]

    def add(self, member: Member) -> None:
        self._roster.add(member)
        self._unproven += not member.proven

    def prove(self, member: Member) -> None:
        """Note that a worker has sent a message after its Hello."""
        member.proven = True
        self._unproven -= 1

    def forget(self, member: Member) -> None:
        """Remove a member. Keep its name if it never took part, so that no other worker gets the name."""
        if not member.proven:
            self._unproven -= 1
            self._forgotten.add(member.name)
        else:
            self._lowest_free = 0
        self._roster.remove(member)

    def is_newcomer_late(self, incarnation: int, now: float) -> bool:
        """Return whether a process has waited long enough for a place that is taken."""
        return now - self._newcomers.setdefault(incarnation, now) >= _TAKEN_S

    def place_of(self, hello: Hello) -> Member | None:
        """Return the member whose place a new process would take, if that member is part of the run.

        A server takes the place of the server with its number. A worker takes the place of the worker that asked for the same
        number. If a process asks for no number and the run is full, it takes the place of the member that has been silent for
        longest.
        """
        there = self._roster.of(hello.role)
        if hello.index is not None:
            name = f"server-{hello.index}"
            asked = (m for m in there.values() if m.hello.index == hello.index or m.name == name)
            return next((member for member in asked if member.active), None)
        if hello.role == "server" and self._roster.lost_server(None) is not None:
            return None  # the lost server's place is free
        full = len(there) >= (self._settings.servers if hello.role == "server" else self._settings.workers)
        if full and (hello.role == "server" or self._policy.is_local):
            return min((m for m in there.values() if m.active), key=lambda member: member.heard_at, default=None)
        return None

    def answer(self, hello: Hello, over: bool) -> Refused | Heartbeat | None:
        """Return the answer to a process that may not join, or not yet. Return None if it may."""
        expected = self._settings.servers if hello.role == "server" else self._settings.workers
        if hello.role == "server":
            number = self.number(hello)
            if number < expected:
                return None
            return Refused("Hello", f"server {number} is one too many: run {self._run} has {expected} servers, from 0.")
        there = self._roster.workers
        if self._policy.is_local and len(there) >= expected:
            if over or any(m.left and m.hello.index == hello.index is not None for m in there.values()):
                return Heartbeat()  # its place is that of a worker whose script has ended, so the process waits
            return Refused("Hello", self._why_full("worker"))
        if (self._unproven if self._roster.started else len(there) - expected) >= MOST_UNPROVEN:
            return Heartbeat()
        why = self._why_no_more()
        return Refused("Hello", why) if why else None

    def number(self, hello: Hello) -> int:
        """Return the number for a process: the one that it asks for if that is free, else the lowest free one."""
        if hello.index is not None and self._is_free(hello.role, hello.index):
            return hello.index
        if hello.role == "server":
            return next(number for number in range(len(self._roster.servers) + 1) if self._is_free("server", number))
        while not self._is_free("worker", self._lowest_free):
            self._lowest_free += 1
        return self._lowest_free

    def is_incomplete(self) -> bool:
        """Return whether some expected processes have not joined."""
        return bool(self._lacks("server") or self._lacks("worker"))

    def missing(self) -> str:
        """Return a text on the processes that must join before the run starts, and on the hosts of the others."""
        lacks = []
        for role in ("server", "worker"):
            if count := self._lacks(role):
                free = (name for n in itertools.count() if (name := f"{role}-{n}") not in self._roster.members)
                names = some(list(itertools.islice(free, count)))
                lacks.append(f"{names} ({count} of {self._wanted(role)} {role}{'s' * (self._wanted(role) > 1)})")
        there = [f"{member.name} on {member.hello.host}" for member in self._roster.members.values() if member.active]
        here = f"; {some(there)} {'is' if len(there) == 1 else 'are'} there" if there else ""
        return f"{' and '.join(lacks)}{here}"[:LONGEST_TEXT]

    def _lacks(self, role: str) -> int:
        """Return how many more of `role` must join before the run starts."""
        there = sum(member.active for member in self._roster.of(role).values())
        return max(0, self._wanted(role) - there)

    def _wanted(self, role: str) -> int:
        return self._settings.servers if role == "server" else self._settings.workers

    def why_apart(self, hello: Hello) -> str:
        """Return why the newcomer `hello` cannot reach a server, or a member cannot reach the newcomer as a server, or ''."""
        newcomer = Member("this server", hello, 0, 0.0)
        there = [member for member in self._roster.members.values() if member.active]
        for server, other in [*((member, newcomer) for member in there), *((newcomer, member) for member in there)]:
            needs = server.hello.role == "server" and (other.hello.role == "worker" or self._settings.replicas > 0)
            if needs and is_loopback(server.hello.address) and server.hello.place.cannot_reach(other.hello.place):
                return (
                    f"{server.name} on {server.hello.host} tells others to reach it at {server.hello.address}, which on "
                    f"{other.hello.host} means that host itself: start it with --listen tcp://*:0, or with an --advertise "
                    "that other hosts reach."
                )
        return ""

    def why_taken(self, hello: Hello) -> str:
        """Return a sentence that says that the place a process asks for is taken."""
        if hello.index is not None:
            return f"there is a {hello.role}-{hello.index} in run {self._run} already."
        return self._why_full(hello.role)

    def _why_no_more(self) -> str:
        """Return why no more workers may join, or ''. Each worker takes memory here, on servers and in the event log."""
        workers, expected = self._roster.workers, self._settings.workers
        if sum(member.active for member in workers.values()) >= (most := _MOST_TIMES * expected + _MOST_MORE):
            return f"run {self._run} has {most} workers, the most with --workers {expected}: start it with more."
        if len(workers) + len(self._forgotten) >= MOST_NAMES:
            return f"run {self._run} has had {MOST_NAMES} workers and takes no more: stop it, and resume it from its checkpoint."
        return ""

    def _why_full(self, role: str) -> str:
        settings = self._settings
        if role == "server":
            return (
                f"run {self._run} already has its {settings.servers} servers (--servers {settings.servers} of the coordinator)."
            )
        return f"policy {settings.policy} cannot add workers after the start: it has its {settings.workers} (--workers)."

    def _is_free(self, role: str, number: int) -> bool:
        name = f"{role}-{number}"
        return name not in self._roster.members and name not in self._forgotten
