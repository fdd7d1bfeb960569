"""Who takes part: rendezvous, signs of life, and the table of shares that each membership epoch has.

A state machine without a socket or a clock. Invariants:

- once the run has started, a worker's name belongs to one incarnation and is never used again; a server's is that of another
  process only if the one before it is lost, and another server has a copy of its shard;
- who has been counted as lost takes part no more, whatever it sends;
- nobody is welcomed before every expected process is there;
- one that joins later has a share only when something else than a Hello has come from it, and until then is one of few: anybody
  who knows the address can say hello, as often as it likes;
- tables have growing epochs, and a new one holds only from a round on that nobody has begun.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from roundtable.common.config.settings import Settings
from roundtable.common.config.work_shares import ShareTable, shares
from roundtable.common.network.addresses import is_loopback
from roundtable.common.network.host_identity import NOWHERE, Place
from roundtable.common.policies import Policy
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.session import (
    Heartbeat,
    Hello,
    MembershipUpdate,
    MembersLost,
    Peer,
    Refused,
    Stop,
    Welcome,
)
from roundtable.common.protocol.tickets import ticket
from roundtable.common.protocol.transport import ASK_AGAIN_S, BEAT_S, STOPPED_S
from roundtable.common.runtime.errors import ClusterError, printable
from roundtable.common.storage.event_log import some

#: Seconds of silence after which a process counts as lost, unless the settings say otherwise: a worker on the coordinator's own
#: host whose work others can do, and all else, where a false alarm costs more.
NEAR_S = 3.0
FAR_S = 15.0
_LONGEST_S = 60.0
#: How often that is doubled at most: more would be no number.
_MOST_DOUBLINGS = 10
#: Characters of a text on who is missing.
_LONGEST_TEXT = 600
#: Seconds between two looks at whether shares should follow the measured speeds.
RESHARE_S = 2.0
#: One that has been silent for so long has died, if another is there to take its place; else the newcomer is refused after so
#: many seconds.
_DEAD_S = 1.5
_TAKEN_S = 6.0
#: One that is silent for longer than between two beats is looked for, if that can be.
_LOOKED_FOR_S = 2 * BEAT_S
#: Workers beyond those expected that have said hello and nothing else, at most; others wait until some are proven or lost.
MOST_UNPROVEN = 64
#: Workers that take part at a time, as many times as were expected and so many more, at most; and names of workers in a run.
_MOST_TIMES = 4
_MOST_MORE = 64
MOST_NAMES = 100_000
#: A new table holds from so many rounds after the newest one known, and so many seconds at the speed of the last ones, for
#: the news to get everywhere first. Where it does not, micro-batches are missing or done twice, and are leased again.
_LEAD_ROUNDS = 2
_LEAD_S = 1.5
#: So many where somebody is gone: until then others do its share micro-batch by micro-batch, which takes longer.
_LEAD_WITHOUT_S = 0.3


@dataclass
class Member:
    """A process that has joined. `left` is set when it said goodbye, `early` if others do what it has not done, `lost` when it
    fell silent."""

    name: str
    hello: Hello
    incarnation: int
    heard_at: float
    beat: Heartbeat = field(default_factory=Heartbeat)
    #: Since when it has been computing the micro-batch of `beat.at`.
    since: float = 0.0
    left: bool = False
    lost: bool = False
    early: bool = False
    #: The rounds that were in a worker's model when its script ended by itself, else -1; and why it failed after the last one.
    ended_at: int = -1
    failed: str = ""
    #: Whether it is a server in the place of one that is gone.
    replaces: bool = False
    #: Whether it takes part: it was there at the start, or has said something since it was welcomed.
    proven: bool = True
    #: The newest membership epoch that it was told of because it did not know it, and when.
    told: int = 0
    told_at: float = 0.0

    @property
    def who(self) -> str:
        """What people are told of it: 'worker-0 on HOST'."""
        return f"{self.name} on {self.hello.host or 'an unknown host'}"

    @property
    def called(self) -> str:
        """Return the member's name and host as printable text."""
        host = printable(self.hello.host)
        return f"{self.name} on {host}" if host else self.name

    @property
    def active(self) -> bool:
        return self.proven and not self.left and not self.lost

    @property
    def reached(self) -> int:
        """The round that a worker is in: it may be at a micro-batch of an earlier one."""
        return max(self.beat.reached, self.beat.round)


class Membership:
    """All members of a run, by name."""

    def __init__(
        self,
        settings: Settings,
        policy: Policy,
        run: str,
        now: float,
        run_dir: str = "",
        resume: int = -1,
        place: Place = NOWHERE,
        key: bytes = b"",
    ) -> None:
        """The run directory is `run_dir` where the coordinator is, at `place`, and the run goes on from the snapshot of round
        `resume` in it, if that is not -1. Tickets are made with `key`."""
        self.settings = settings
        self.run = run
        #: The same, as people know it: without what tells it from itself before all began anew.
        self._name = run.partition(".")[0]
        self._run_dir = run_dir
        self._resume = resume
        self._place = place
        self._key = key
        #: Why the run must go on from its newest snapshot, once it must.
        self.broken = ""
        #: Since when new processes have been waiting for a place that seems to be taken, oldest first.
        self._newcomers: dict[int, float] = {}
        self.members: dict[str, Member] = {}
        #: Those of them that are servers, and those that are workers.
        self.servers: dict[str, Member] = {}
        self.workers: dict[str, Member] = {}
        self._incarnations: dict[int, Member] = {}
        #: Workers that were welcomed and never heard of again, which are no members any more: their numbers are not given again.
        self._forgotten: set[str] = set()
        #: No worker of a lower number can be had, where none was asked for.
        self._lowest_free = 0
        self._unproven = 0
        #: Whether workers take part that have no share yet.
        self._is_change_due = False
        self.started = False
        #: Workers that were there when the run started under this coordinator.
        self.starters: frozenset[str] = frozenset()
        self.tables: list[ShareTable] = []
        #: Grows whenever the workers or their shares change.
        self.epoch = 0
        #: Whether all rounds are done that are known of: then nobody's part is missing.
        self.over = False
        #: Members that were lost, why, and their process ids, until this is told of; and all workers that are gone, as servers
        #: are to know.
        self.newly_lost: list[tuple[str, str, int]] = []
        #: Those of them that had a name and never took part.
        self.newly_forgotten: list[Member] = []
        self.losses = MembersLost(0, [])
        #: How often a process, by place and id, was counted as lost.
        self._alarms: Counter[tuple[str, str, int]] = Counter()
        #: Seconds after which the run starts with fewer workers than it should have, if there are any.
        self.fewer_after_s = float("inf")
        self._policy = policy
        self._began_at = now
        self._reshared_at = self._ticked_at = now
        #: The newest round that a worker was in at the last look, and rounds per second since the one before.
        self._newest = 0
        self._pace = 0.0

    def restore(self, members: Iterable[Member], tables: list[ShareTable]) -> None:
        """Take over the members and tables of a coordinator that is gone. All are to tell anew where they are, for which they
        have until their `heard_at`."""
        for member in members:
            self.members[member.name] = self._of(member.hello.role)[member.name] = self._incarnations[member.incarnation] = member
        self.tables, self.started = tables, bool(tables)
        self._newest = self._newest_round()
        self._is_change_due = bool(tables) and self.names("worker") != tables[-1].workers
        gone = sum(member.lost or member.early for member in self.workers.values())
        self.epoch = tables[-1].epoch + gone if tables else 0  # some epochs had no shares, for nobody was left
        self._note_losses()

    def names(self, role: str) -> list[str]:
        """Members of `role` that are still part of the run, by number."""
        return sorted((name for name, member in self._of(role).items() if member.active), key=number_of)

    def _of(self, role: str) -> dict[str, Member]:
        return self.servers if role == "server" else self.workers

    def knows(self, incarnation: int) -> bool:
        """Whether a process of this incarnation is a member."""
        return incarnation in self._incarnations

    def hello(
        self, hello: Hello, incarnation: int, now: float, is_dead: Callable[[Hello], bool] = lambda hello: False
    ) -> tuple[Member | None, list[tuple[str, Body]]]:
        """A process asks to join: the member it is (None if refused), and what to answer to whom ('' is the asker). `is_dead`
        says of another whether it is certain that its process is gone."""
        member = self._incarnations.get(incarnation)
        if member is not None and member.lost:
            return None, [("", self.fence(member))]
        if member is not None:
            member.heard_at = now
            return member, [("", self._answer(member))]
        if reason := self._why_apart(hello):
            return None, [("", Refused("Hello", reason))]
        if (taken := self._place_of(hello)) is not None:
            is_gone = now - taken.heard_at > _DEAD_S or is_dead(taken.hello)
            if is_gone and not self._awaits_keeper(taken, now):
                self._lose(taken, f"process {taken.hello.pid} on {taken.hello.host} has died and begins anew")
            elif now - self._newcomers.setdefault(incarnation, now) >= _TAKEN_S:
                return None, [("", Refused("Hello", self._why_taken(hello)))]
            if not taken.lost:
                return None, [("", Heartbeat())]
        if self.broken:
            return None, [("", Heartbeat())]
        if hello.role == "server" and self.started and (gone := self._gone_server(hello.index)) is not None:
            return self._replace(gone, hello, incarnation, now)
        expected = self.settings.servers if hello.role == "server" else self.settings.workers
        there = self._of(hello.role)
        if hello.role == "worker" and self._policy.is_local and len(there) >= expected:
            if self.over or any(m.left and m.hello.index == hello.index is not None for m in there.values()):
                return None, [
                    ("", Heartbeat())
                ]  # in the place of one that had ended its script, there is nothing to do but to wait
            return None, [("", Refused("Hello", self._why_full("worker")))]
        if hello.role == "worker" and (self._unproven if self.started else len(there) - expected) >= MOST_UNPROVEN:
            return None, [("", Heartbeat())]
        if hello.role == "worker" and (why := self._why_no_more()):
            return None, [("", Refused("Hello", why))]
        number = hello.index
        if number is None or not self._is_free(hello.role, number):
            number = self._free_number(hello.role)
        if hello.role == "server" and number >= expected:
            return None, [
                ("", Refused("Hello", f"server {number} is one too many: run {self._name} has {expected} servers, from 0."))
            ]
        member = Member(f"{hello.role}-{number}", hello, incarnation, now, proven=not self.started or self.awaits_workers)
        self.members[member.name] = there[member.name] = self._incarnations[incarnation] = member
        if not member.proven:
            self._unproven += 1
        if self.started:
            told = self._change() if member.proven or taken is not None else []
            return member, [("", self._answer(member)), *told]
        if self._lacks("server") or self._lacks("worker"):
            return member, [("", self._answer(member))]
        return member, self._start()

    def _why_apart(self, hello: Hello) -> str:
        """Why a server and somebody who needs it cannot reach each other, if one of them is the newcomer; '' if they may."""
        newcomer, there = Member("this server", hello, 0, 0.0), [member for member in self.members.values() if member.active]
        for server, other in [*((member, newcomer) for member in there), *((newcomer, member) for member in there)]:
            needs = server.hello.role == "server" and (other.hello.role == "worker" or self.settings.replicas > 0)
            if needs and is_loopback(server.hello.address) and server.hello.place.cannot_reach(other.hello.place):
                return (
                    f"{server.name} on {server.hello.host} tells others to reach it at {server.hello.address}, which on "
                    f"{other.hello.host} means that host itself: start it with --listen tcp://*:0, or with an --advertise "
                    "that other hosts reach."
                )
        return ""

    def _is_free(self, role: str, number: int) -> bool:
        name = f"{role}-{number}"
        return name not in self.members and name not in self._forgotten

    def _free_number(self, role: str) -> int:
        if role == "server":
            return next(number for number in range(len(self.servers) + 1) if self._is_free(role, number))
        while not self._is_free(role, self._lowest_free):
            self._lowest_free += 1
        return self._lowest_free

    def _start(self) -> list[tuple[str, Body]]:
        self.started = True
        workers = self.names("worker")
        self.starters = frozenset(workers)
        self.epoch = 1
        self.tables = [ShareTable(self.epoch, 0, workers, [1] * len(workers))]
        self.losses = MembersLost(0, [], self.peers)
        return [(m.name, self._answer(m)) for m in self.members.values()]

    # ---- servers that are replaced

    def _gone_server(self, index: int | None) -> Member | None:
        """A server that is lost, and that another is to replace: the one of that number, or any."""
        return next((m for m in self.servers.values() if m.lost and index in (None, number_of(m.name))), None)

    def _replace(self, gone: Member, hello: Hello, incarnation: int, now: float) -> tuple[Member | None, list[tuple[str, Body]]]:
        """Have a new process in the place of a server that is lost."""
        member = Member(gone.name, hello, incarnation, now, replaces=True)
        self.members[member.name] = self.servers[member.name] = self._incarnations[incarnation] = member
        return member, [("", self._answer(member)), *self._change()]

    def _keeper(self, member: Member) -> Member | None:
        """The server after `member`, if that is a server and is to have a copy of its shard, and is part of the run."""
        if not self.settings.replicas or not self.started or member.hello.role != "server":
            return None
        keeper = self.servers.get(f"server-{(number_of(member.name) + 1) % self.settings.servers}")
        return keeper if keeper is not None and keeper.active else None

    def _has_copy(self, server: Member) -> bool:
        """Whether another server has a copy of the shard of one that is lost."""
        keeper = self._keeper(server)
        return keeper is not None and number_of(server.name) in keeper.beat.replicas_held

    def _awaits_keeper(self, member: Member, now: float) -> bool:
        """Whether it is yet to be known if there is a copy of its shard."""
        keeper = self._keeper(member)
        return keeper is not None and not keeper.beat.state and keeper.heard_at > now - _DEAD_S

    @property
    def lost_servers(self) -> list[str]:
        """Servers that another process is to replace."""
        return [member.name for member in self.servers.values() if member.lost]

    @property
    def peers(self) -> list[Peer]:
        """All servers, by number, as servers know each other."""
        members = sorted(self.servers.values(), key=lambda member: number_of(member.name))
        return [Peer(member.hello.address, member.incarnation) for member in members]

    @property
    def peers_of_workers(self) -> list[Peer]:
        """The same as workers are told them: who knew a server's incarnation could speak in its name."""
        return [Peer(peer.address, ticket(self._key, f"server {peer.incarnation}")) for peer in self.peers]

    def _place_of(self, hello: Hello) -> Member | None:
        """Whose place a new process would take, if one's that is still part of the run: a server that of its number, a worker
        that of who asked for the same; or where there can be no more, that of the one that has been silent for longest."""
        there = self._of(hello.role)
        if hello.index is not None:
            name = f"server-{hello.index}"
            asked = (m for m in there.values() if m.hello.index == hello.index or m.name == name)
            return next((member for member in asked if member.active), None)
        if hello.role == "server" and self._gone_server(None) is not None:
            return None  # there is a place that is free
        full = len(there) >= (self.settings.servers if hello.role == "server" else self.settings.workers)
        if full and (hello.role == "server" or self._policy.is_local):
            return min((m for m in there.values() if m.active), key=lambda member: member.heard_at, default=None)
        return None

    def _why_taken(self, hello: Hello) -> str:
        if hello.index is not None:
            return f"there is a {hello.role}-{hello.index} in run {self._name} already."
        return self._why_full(hello.role)

    def _why_no_more(self) -> str:
        """Why no other worker is taken in; empty if one is. Each takes up memory here, on the servers and in the books."""
        if sum(member.active for member in self.workers.values()) >= (most := _MOST_TIMES * self.settings.workers + _MOST_MORE):
            return (
                f"run {self._name} has {most} workers, and takes no more where --workers is {self.settings.workers}: "
                "start it with more."
            )
        if len(self.workers) + len(self._forgotten) >= MOST_NAMES:
            return f"run {self._name} has had {MOST_NAMES} workers, and takes no more: stop it, and go on from its snapshot."
        return ""

    def _why_full(self, role: str) -> str:
        if role == "server":
            expected = self.settings.servers
            return f"run {self._name} has all of its {expected} servers already; the coordinator's --servers says how many."
        return f"policy {self.settings.policy} cannot take in more than the {self.settings.workers} workers it began with."

    def fence(self, member: Member) -> Stop:
        """What one that was counted as lost is told, whatever it sends: to begin anew, for others do what it had."""
        return Stop(False, f"{member.name} was silent for too long and counts as lost; it joins again as another.", restart=True)

    def _answer(self, member: Member) -> Body:
        if not self.started:
            return Heartbeat(awaited=self.missing())
        told = self.run, self.settings
        if member.hello.role == "worker":
            return Welcome(
                member.name, *told, self.peers_of_workers, self.tables, self._run_dir, self._resume,
                ticket=ticket(self._key, member.name),
            )  # fmt: skip
        return Welcome(member.name, *told, self.peers, self.tables, self._run_dir, self._resume, member.replaces, key=self._key)

    def heard(self, member: Member, now: float) -> None:
        """Something has come from a member other than its Hello."""
        member.heard_at = now
        if not member.proven:
            member.proven = self._is_change_due = True
            self._unproven -= 1

    def beat(self, name: str, beat: Heartbeat, now: float) -> None:
        member = self.members[name]
        self.heard(member, now)
        if (beat.round, beat.micro_batch) != (member.beat.round, member.beat.micro_batch):
            member.since = now
        member.beat = beat

    def tick(self, now: float, is_dead: Callable[[Hello], bool] = lambda hello: False) -> list[tuple[str, Body]]:
        """Messages that are due: new tables. Marks silent members as lost, and notes them in `newly_lost`. `is_dead` says of one
        that has been silent for a while whether it is certain that its process is gone.

        Raises ClusterError where the run cannot start or go on.
        """
        if (stopped_s := now - self._ticked_at) > STOPPED_S:
            for member in self.members.values():
                member.heard_at += stopped_s  # nobody was listening
        self._ticked_at = now
        while self._newcomers and now > next(iter(self._newcomers.values())) + 2 * _TAKEN_S:
            del self._newcomers[next(iter(self._newcomers))]
        watched = [member for member in self.members.values() if not member.lost and not member.early]
        lost = [(member, why) for member in watched if (why := self._why_lost(member, now, is_dead))]
        for member, why in lost:
            self._lose(member, why)
        if not self.started:
            fewer = len(self.names("server")) == self.settings.servers and self.names("worker")
            if fewer and now - self._began_at > self.fewer_after_s:
                return self._start()
            if now - self._began_at > self.settings.start_timeout:
                raise ClusterError(
                    f"{self.missing()} did not join within {self.settings.start_timeout:g} s, as --start-timeout says."
                )
            return []
        if self._is_change_due or any(member.proven for member, _ in lost):
            return self._change()
        if now - self._reshared_at > RESHARE_S and not self._policy.is_local:
            newest = self._newest_round()
            self._pace = (newest - self._newest) / (now - self._reshared_at)
            self._newest, self._reshared_at = newest, now
            if self._speeds_changed():
                return self._change()
        return []

    def leave(self, name: str, early: bool) -> list[tuple[str, Body]]:
        """A member says goodbye. One that is `early` may have been there until now, or have left as if it had done its part."""
        member = self.members[name]
        is_news = early and not member.early and not member.lost
        member.left, member.early = True, member.early or early
        if member.early:
            member.beat = _counts_of(member.beat)
        return self._change() if is_news else []

    def dismiss(self, name: str) -> list[tuple[str, Body]]:
        """Have a member leave that was told to stop, and whose part nobody has: it counts as lost."""
        member = self.members[name]
        self._lose(member, f"process {member.hello.pid} on {member.hello.host} was told to stop")
        return self._change()

    def train_on(self) -> None:
        """There are more rounds to do than were known of."""
        self.over = False
        if self._policy.is_local:
            gone = [member.name for member in self.workers.values() if member.lost and not member.left]
            self.broken = self.broken or (f"{some(gone)} died between two loops over batches." if gone else "")

    def news(self, member: Member, epoch: int, now: float) -> Body | None:
        """What a member has not heard of that knows membership epoch `epoch`: not again while it may be on its way, for of many
        workers these are long messages."""
        is_server = member.hello.role == "server"
        newest = self.losses.epoch if is_server else self.tables[-1].epoch if self.tables else 0
        if epoch >= newest or (epoch == 0 and not is_server) or (newest == member.told and now < member.told_at + ASK_AGAIN_S):
            return None
        member.told, member.told_at = newest, now
        return self.losses if is_server else self.shares

    @property
    def shares(self) -> MembershipUpdate:
        """What workers are to know."""
        return MembershipUpdate(self.tables, self.peers_of_workers)

    @property
    def awaits_workers(self) -> bool:
        """Whether those who were to do the rest are gone and no script has ended by itself, so that others are waited for."""
        return self.started and all(m.lost or (m.early and m.ended_at < 0) or not m.proven for m in self.workers.values())

    def silence_s(self, member: Member) -> float:
        """Seconds of silence after which `member` counts as lost. By default twice as long each time that the same process, which
        was counted as lost, turned out to be alive: it may be one that cannot help being silent."""
        if self.settings.heartbeat_timeout is not None:
            return self.settings.heartbeat_timeout
        replaceable = member.hello.role == "worker" and not self._policy.is_local
        bound = NEAR_S if replaceable and member.hello.place.sees(self._place) else FAR_S
        return min(bound * 2.0 ** min(self._alarms[_process(member)], _MOST_DOUBLINGS), _LONGEST_S)

    def _why_lost(self, member: Member, now: float, is_dead: Callable[[Hello], bool]) -> str:
        """Why `member` counts as lost; empty if it does not."""
        silent_s, who = now - member.heard_at, f"process {member.hello.pid} on {member.hello.host}"
        if self._awaits_keeper(member, now):
            return ""
        if silent_s > _LOOKED_FOR_S and is_dead(member.hello):
            return f"{who} is dead"
        return f"{who} was silent for {self.silence_s(member):g} s" if silent_s > self.silence_s(member) else ""

    def _lose(self, member: Member, why: str) -> None:
        """Count a member as lost. One that has ended its script is watched too, for it may yet have to hand in the model. Before
        the start nothing was promised to anybody, so it is just forgotten, as is one that never took part."""
        member.lost, member.beat = True, _counts_of(member.beat)
        self.newly_lost.append((member.name, why, member.hello.pid))
        if member.proven:
            self._alarms[_process(member)] += 1
        else:
            self._unproven -= 1
            self._forgotten.add(member.name)
            self.newly_forgotten.append(member)
        if not self.started or not member.proven:
            del self.members[member.name], self._of(member.hello.role)[member.name], self._incarnations[member.incarnation]
            if not self.started:
                self._lowest_free = 0
        elif member.hello.role == "server":
            needed = [server for server in self.servers.values() if server.lost or (server.replaces and server.beat.round < 0)]
            if not all(self._has_copy(server) for server in needed):
                self.broken = f"{member.name}: {why}."
        elif self._policy.is_local and not member.left and not self.over:
            self.broken = f"{member.name}: {why}."

    def _to_workers(self, body: Body) -> list[tuple[str, Body]]:
        return [(name, body) for name in self.names("worker")]

    def _lacks(self, role: str) -> int:
        """How many more of `role` are to join before the run starts."""
        there = sum(member.active for member in self._of(role).values())
        return max(0, self._wanted(role) - there)

    def _wanted(self, role: str) -> int:
        return self.settings.servers if role == "server" else self.settings.workers

    def missing(self) -> str:
        """Who is to join before the run starts, by role and number, and on which hosts the others are."""
        lacks = []
        for role in ("server", "worker"):
            if count := self._lacks(role):
                free = (name for n in itertools.count() if (name := f"{role}-{n}") not in self.members)
                names = some(list(itertools.islice(free, count)))
                lacks.append(f"{names} ({count} of {self._wanted(role)} {role}{'s' * (self._wanted(role) > 1)})")
        there = [f"{member.name} on {member.hello.host}" for member in self.members.values() if member.active]
        here = f"; {some(there)} {'is' if len(there) == 1 else 'are'} there" if there else ""
        return f"{' and '.join(lacks)}{here}"[:_LONGEST_TEXT]

    def awaited(self) -> str:
        """Who is to join for a run that has started to go on, and who was there before it; '' if nobody is."""
        gone = [member for member in self.servers.values() if member.lost]
        if not gone and self.awaits_workers:
            gone = [member for member in self.workers.values() if member.lost or member.early]
        return some([f"another process in the place of {m.name}, which was on {m.hello.host}" for m in gone])[:_LONGEST_TEXT]

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
        return max([member.reached for member in self.workers.values()], default=0)

    def _change(self) -> list[tuple[str, Body]]:
        """Open a membership epoch; what to tell workers and servers."""
        self.epoch += 1
        self._is_change_due = False
        workers, told = self.names("worker"), []
        if workers and not self._policy.is_local:
            self._new_table(workers)
            told = self._to_workers(self.shares)
        if self._note_losses():
            told += [(name, self.losses) for name in self.names("server")]
        return told

    def _note_losses(self) -> bool:
        """Put down who is no part of the run any more, and the servers; whether that is news."""
        gone = [name for name, member in self.workers.items() if member.lost or member.early]
        if (gone, self.peers) == (self.losses.workers, self.losses.servers):
            return False
        self.losses = MembersLost(self.epoch, gone, self.peers)
        return True

    def _new_table(self, workers: list[str]) -> None:
        gone = [not self.members[name].active for name in self.tables[-1].workers]
        if all(gone):  # nobody has begun anything
            self.tables = [ShareTable(self.epoch, 0, workers, self._weights(workers))]
            return
        lead = _LEAD_ROUNDS + round(self._pace * (_LEAD_WITHOUT_S if any(gone) else _LEAD_S))
        first = max(self._newest_round() + lead, self.tables[-1].from_round + 1)
        self.tables = [*self.tables[-7:], ShareTable(self.epoch, first, workers, self._weights(workers))]


def _process(member: Member) -> tuple[str, str, int]:
    """What is the same of one that joins again, and of no two that are there at once."""
    return member.hello.place.pids, member.hello.host, member.hello.pid


def _counts_of(beat: Heartbeat) -> Heartbeat:
    """What is kept of the last word of one that is gone: what the summary counts, and where it was."""
    return Heartbeat(
        round=beat.round,
        rate=beat.rate,
        reached=beat.reached,
        traffic=beat.traffic,
        replicas_held=beat.replicas_held,
        refused=beat.refused,
    )


def number_of(name: str) -> int:
    """3 for 'worker-3'."""
    return int(name.rpartition("-")[2])
