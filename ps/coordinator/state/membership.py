"""The membership of a run: joining, heartbeats, losses, and membership epochs.

`Membership` is a state machine without a socket or a clock. Invariants:

- Once the run has started, a worker's name belongs to one incarnation and is never used again. A server's name goes to another
  process only if the server is lost and its backup has a copy of its shard.
- A member that has counted as lost never takes part again, whatever it sends.
- No process is welcomed before every expected process has joined.
- A worker that joins later gets a share only once it has sent a message after its Hello. Few workers may be in that state: any
  process that knows the address can send a Hello, as often as it likes.
- Share tables have growing epochs, and a new one holds only from a round that no worker has begun.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from roundtable.common.config.settings import Settings
from roundtable.common.config.work_shares import ShareTable
from roundtable.common.network.host_identity import NOWHERE, Place
from roundtable.common.policies import Policy
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.session import (
    Heartbeat,
    Hello,
    MembershipUpdate,
    MembersLost,
    Refused,
)
from roundtable.common.protocol.transport import ASK_AGAIN_S
from roundtable.common.runtime.errors import ClusterError
from roundtable.common.storage.event_log import some
from roundtable.ps.coordinator.state.admission import LONGEST_TEXT, Admission
from roundtable.ps.coordinator.state.failure_detector import FailureDetector
from roundtable.ps.coordinator.state.introductions import Introductions
from roundtable.ps.coordinator.state.roster import DEAD_S, Backups, Member, Roster
from roundtable.ps.coordinator.state.share_tables import ShareTables

#: (member, message) to send. '' stands for the process that has asked.
News = list[tuple[str, Body]]


class Membership:
    """The members of a run, and the messages that tell them of each other."""

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
        """Start without members. `run_dir` is the run directory's path on the coordinator's host. `place` is the coordinator's.

        If `resume` is not -1, the run goes on from the checkpoint of that round. Tickets are made with `key`.
        """
        self.settings = settings
        self._policy = policy
        self._roster = Roster()
        self.members, self.servers, self.workers = self._roster.members, self._roster.servers, self._roster.workers
        self._admission = Admission(settings, policy, self._roster, run.partition(".")[0])
        self._detector = FailureDetector(settings, policy, place, now)
        self.backups = Backups(settings, self._roster)
        self._share_tables = ShareTables(settings, self._roster, now)
        self.introductions = Introductions(settings, run, run_dir, resume, key, self._roster, self._share_tables)
        #: The membership epoch. It grows when workers, shares or servers change.
        self.epoch = 0
        #: Why the run must restart from its newest checkpoint, or ''.
        self.broken = ""
        #: True if workers without a share take part.
        self._is_change_due = False
        #: Workers that were there when the run started under this coordinator.
        self.starters: frozenset[str] = frozenset()
        #: True if all known rounds are done, so that a loss does not break the run.
        self.over = False
        #: (name, why, process id) of lost members that were not reported yet.
        self.newly_lost: list[tuple[str, str, int]] = []
        #: The members in `newly_lost` that never took part.
        self.newly_forgotten: list[Member] = []
        #: The message to servers with all workers that are gone and all servers.
        self.losses = MembersLost(0, [])
        #: Seconds after which the run starts with the workers that have joined, if there are any.
        self.fewer_after_s = float("inf")
        self._began_at = now

    # ---- queries

    @property
    def started(self) -> bool:
        """Return whether the run has started: all expected processes had joined."""
        return self._roster.started

    @property
    def tables(self) -> list[ShareTable]:
        """Return the share tables in force, oldest first."""
        return self._share_tables.tables

    def names(self, role: str) -> list[str]:
        """Return the names of the members of `role` that are part of the run, in the order of their numbers."""
        return self._roster.names(role)

    def knows(self, incarnation: int) -> bool:
        """Return whether the process with this incarnation is a member."""
        return incarnation in self._roster.incarnations

    @property
    def lost_servers(self) -> list[str]:
        """Return the names of lost servers, which other processes must replace."""
        return [member.name for member in self.servers.values() if member.lost]

    @property
    def shares(self) -> MembershipUpdate:
        """Return the share tables and servers for workers."""
        return self.introductions.shares

    @property
    def awaits_workers(self) -> bool:
        """Return whether the run waits for new workers: its workers are gone, and no script has ended by itself."""
        return self.started and all(m.lost or (m.early and m.ended_at < 0) or not m.proven for m in self.workers.values())

    def silence_s(self, member: Member) -> float:
        """Return the seconds of silence after which `member` counts as lost."""
        return self._detector.silence_s(member)

    def missing(self) -> str:
        """Return a text on the processes that must join before the run starts, and on the hosts of the others."""
        return self._admission.missing()

    def awaited(self) -> str:
        """Return a text on the processes that must join for a started run to go on, and on those before them, or ''."""
        gone = [member for member in self.servers.values() if member.lost]
        if not gone and self.awaits_workers:
            gone = [member for member in self.workers.values() if member.lost or member.early]
        return some([f"a replacement of {m.name}, which was on {m.hello.host}" for m in gone])[:LONGEST_TEXT]

    # ---- joining

    def restore(self, members: Iterable[Member], tables: list[ShareTable]) -> None:
        """Take over the members and tables of the coordinator before. A member's `heard_at` may lie in the future."""
        for member in members:
            self._roster.add(member)
        self._share_tables.restore(tables)
        self._roster.started = bool(tables)
        self._is_change_due = bool(tables) and self.names("worker") != tables[-1].workers
        gone = sum(member.lost or member.early for member in self.workers.values())
        self.epoch = tables[-1].epoch + gone if tables else 0  # epochs in which no worker was left had no table
        self._note_losses()

    def hello(
        self, hello: Hello, incarnation: int, now: float, is_dead: Callable[[Hello], bool] = lambda hello: False
    ) -> tuple[Member | None, News]:
        """Let a process join. Return its member, or None if it may not join now, and the messages to send.

        `is_dead` returns True if a process has certainly ended.
        """
        member = self._roster.incarnations.get(incarnation)
        if member is not None and member.lost:
            return None, [("", member.fence())]
        if member is not None:
            member.heard_at = now
            return member, [("", self._answer(member))]
        if reason := self._admission.why_apart(hello):
            return None, [("", Refused("Hello", reason))]
        taken = self._admission.place_of(hello)
        if taken is not None and (answer := self._answer_for_taken(taken, hello, incarnation, now, is_dead)) is not None:
            return None, [("", answer)]
        if self.broken:
            return None, [("", Heartbeat())]
        if hello.role == "server" and self.started and (gone := self._roster.lost_server(hello.index)) is not None:
            return self._replace(gone, hello, incarnation, now)
        if (answer := self._admission.answer(hello, self.over)) is not None:
            return None, [("", answer)]
        name = f"{hello.role}-{self._admission.number(hello)}"
        member = Member(name, hello, incarnation, now, proven=not self.started or self.awaits_workers)
        self._admission.add(member)
        if self.started:
            told = self._change() if member.proven or taken is not None else []
            return member, [("", self._answer(member)), *told]
        if self._admission.is_incomplete():
            return member, [("", self._answer(member))]
        return member, self._start()

    def _answer_for_taken(
        self, taken: Member, hello: Hello, incarnation: int, now: float, is_dead: Callable[[Hello], bool]
    ) -> Body | None:
        """Return the answer to a process that asks for the place of `taken`.

        If `taken` is dead, count it as lost and return None.
        """
        is_gone = now - taken.heard_at > DEAD_S or is_dead(taken.hello)
        if is_gone and not self.backups.may_exist(taken, now):
            self._lose(taken, f"process {taken.hello.pid} on {taken.hello.host} has died")
        elif self._admission.is_newcomer_late(incarnation, now):
            return Refused("Hello", self._admission.why_taken(hello))
        return None if taken.lost else Heartbeat()

    def _replace(self, gone: Member, hello: Hello, incarnation: int, now: float) -> tuple[Member, News]:
        """Put a new process in the place of a lost server. Return its member and the messages to send."""
        member = Member(gone.name, hello, incarnation, now, replaces=True)
        self._admission.add(member)
        return member, [("", self._answer(member)), *self._change()]

    def _start(self) -> News:
        self._roster.started = True
        workers = self.names("worker")
        self.starters = frozenset(workers)
        self.epoch = 1
        self._share_tables.start(self.epoch, workers)
        self.losses = MembersLost(0, [], self.introductions.peers)
        return [(member.name, self._answer(member)) for member in self.members.values()]

    def _answer(self, member: Member) -> Body:
        return self.introductions.welcome(member) if self.started else Heartbeat(awaited=self.missing())

    # ---- staying

    def heard(self, member: Member, now: float) -> None:
        """Note that a member has sent a message other than a Hello."""
        member.heard_at = now
        if not member.proven:
            self._admission.prove(member)
            self._is_change_due = True

    def heartbeat(self, name: str, heartbeat: Heartbeat, now: float) -> None:
        """Take a member's heartbeat."""
        member = self.members[name]
        self.heard(member, now)
        if (heartbeat.round, heartbeat.micro_batch) != (member.heartbeat.round, member.heartbeat.micro_batch):
            member.since = now
        member.heartbeat = heartbeat

    def news(self, member: Member, epoch: int, now: float) -> Body | None:
        """Return the news for a member that knows membership epoch `epoch`, or None if the news is known or under way.

        With many workers these messages are long.
        """
        is_server = member.hello.role == "server"
        newest = self.losses.epoch if is_server else self.tables[-1].epoch if self.tables else 0
        is_on_its_way = newest == member.epoch_announced and now < member.announced_at + ASK_AGAIN_S
        if epoch >= newest or (epoch == 0 and not is_server) or is_on_its_way:
            return None
        member.epoch_announced, member.announced_at = newest, now
        return self.losses if is_server else self.shares

    def tick(self, now: float, is_dead: Callable[[Hello], bool] = lambda hello: False) -> News:
        """Count silent members as lost. Return the messages that are due, such as new share tables.

        `is_dead` returns True if a process has certainly ended. Raises ClusterError if the run cannot start.
        """
        self._detector.note_pause(self._roster, now)
        self._admission.tick(now)
        watched = [m for m in self.members.values() if not m.lost and not m.early and not self.backups.may_exist(m, now)]
        lost = [(member, why) for member in watched if (why := self._detector.why_lost(member, now, is_dead))]
        for member, why in lost:
            self._lose(member, why)
        if not self.started:
            return self._start_late(now)
        if self._is_change_due or any(member.proven for member, _ in lost):
            return self._change()
        return self._change() if not self._policy.is_local and self._share_tables.should_change(now) else []

    def _start_late(self, now: float) -> News:
        """Start with fewer workers if that is allowed by now. Raises ClusterError once `start_timeout` has passed."""
        fewer = len(self.names("server")) == self.settings.servers and self.names("worker")
        if fewer and now - self._began_at > self.fewer_after_s:
            return self._start()
        if now - self._began_at > self.settings.start_timeout:
            raise ClusterError(
                f"{self.missing()} did not join within {self.settings.start_timeout:g} s, as --start-timeout says."
            )
        return []

    def train_on(self) -> None:
        """Go on with more rounds than were known. If workers step locally, the run is broken if a worker has died since."""
        self.over = False
        if self._policy.is_local:
            gone = [member.name for member in self.workers.values() if member.lost and not member.left]
            self.broken = self.broken or (f"{some(gone)} died between two loops over batches." if gone else "")

    # ---- leaving

    def leave(self, name: str, early: bool) -> News:
        """Note that a member leaves. With `early`, others do the rest of its work. Return the messages to send."""
        member = self.members[name]
        is_news = early and not member.early and not member.lost
        member.left, member.early = True, member.early or early
        if member.early:
            member.keep_counts()
        return self._change() if is_news else []

    def dismiss(self, name: str) -> News:
        """Let a member that was told to stop leave, and count it as lost. Return the messages to send."""
        member = self.members[name]
        self._lose(member, f"process {member.hello.pid} on {member.hello.host} was told to stop")
        return self._change()

    def _lose(self, member: Member, why: str) -> None:
        """Count a member as lost.

        A member that never took part is forgotten. So is any member before the start, when nothing was promised to it. The run
        breaks if a server is lost without a copy of its shard, or a worker under a policy that needs all workers.
        """
        member.lost = True
        member.keep_counts()
        self.newly_lost.append((member.name, why, member.hello.pid))
        if member.proven:
            self._detector.note_loss(member)
        else:
            self.newly_forgotten.append(member)
        if not self.started or not member.proven:
            self._admission.forget(member)
        elif member.hello.role == "server":
            if not self.backups.exist_for_all():
                self.broken = f"{member.name}: {why}."
        elif self._policy.is_local and not member.left and not self.over:
            self.broken = f"{member.name}: {why}."

    def _change(self) -> News:
        """Open a membership epoch. Return the messages to workers and servers."""
        self.epoch += 1
        self._is_change_due = False
        told: News = []
        workers = self.names("worker")
        if workers and not self._policy.is_local:
            self._share_tables.add(self.epoch, workers)
            told = [(name, self.shares) for name in workers]
        if self._note_losses():
            told += [(name, self.losses) for name in self.names("server")]
        return told

    def _note_losses(self) -> bool:
        """Update `losses`. Return whether it has changed."""
        gone = [name for name, member in self.workers.items() if member.lost or member.early]
        if (gone, self.introductions.peers) == (self.losses.workers, self.losses.servers):
            return False
        self.losses = MembersLost(self.epoch, gone, self.introductions.peers)
        return True
