"""The members of a run and the state of each."""

from __future__ import annotations

from dataclasses import dataclass, field

from roundtable.common.config.settings import Settings
from roundtable.common.protocol.effects import number_of
from roundtable.common.protocol.messages.session import Heartbeat, Hello, Stop
from roundtable.common.runtime.errors import printable

#: A member that has been silent for this many seconds counts as dead if another process asks for its place.
DEAD_S = 1.5


@dataclass
class Member:
    """A process that has joined."""

    name: str
    hello: Hello
    incarnation: int
    #: When the member last sent a message.
    heard_at: float
    #: The member's last heartbeat.
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    #: Since when the member has computed `heartbeat.micro_batch`.
    since: float = 0.0
    #: True if the member has sent a Goodbye.
    left: bool = False
    #: True if the member fell silent, died or was dismissed.
    lost: bool = False
    #: True if the member left and others do the rest of its work.
    early: bool = False
    #: The rounds that were in a worker's model when its script ended by itself, or -1.
    ended_at: int = -1
    #: Why the script failed after the last round, or ''.
    failed: str = ""
    #: True if the member is a server that replaces a lost one.
    replaces: bool = False
    #: True if the member takes part: it was there at the start, or has sent any message after its Hello.
    proven: bool = True
    #: The newest membership epoch that was sent to the member because it did not know it.
    epoch_announced: int = 0
    #: When that epoch was sent.
    announced_at: float = 0.0

    @property
    def who(self) -> str:
        """Return the member's name for users: 'worker-0 on HOST'."""
        return f"{self.name} on {self.hello.host or 'an unknown host'}"

    @property
    def called(self) -> str:
        """Return the member's name and host as printable text."""
        host = printable(self.hello.host)
        return f"{self.name} on {host}" if host else self.name

    @property
    def active(self) -> bool:
        """Return whether the member is part of the run."""
        return self.proven and not self.left and not self.lost

    @property
    def reached(self) -> int:
        """Return the round that a worker is in. The worker may compute a micro-batch of an earlier round."""
        return max(self.heartbeat.reached, self.heartbeat.round)

    def fence(self) -> Stop:
        """Return the order to restart, which answers any message of a lost member, because others do its work."""
        return Stop(False, f"{self.name} missed its heartbeats and counts as dead; it rejoins under a new name.", restart=True)

    def keep_counts(self) -> None:
        """Reduce the last heartbeat of a member that is gone to its round and the counts for the summary."""
        heartbeat = self.heartbeat
        self.heartbeat = Heartbeat(
            round=heartbeat.round,
            rate=heartbeat.rate,
            reached=heartbeat.reached,
            traffic=heartbeat.traffic,
            replicas_held=heartbeat.replicas_held,
            refused=heartbeat.refused,
        )


class Roster:
    """All members of a run."""

    def __init__(self) -> None:
        #: By name: all members.
        self.members: dict[str, Member] = {}
        #: By name: the members that are servers.
        self.servers: dict[str, Member] = {}
        #: By name: the members that are workers.
        self.workers: dict[str, Member] = {}
        #: By incarnation: all members.
        self.incarnations: dict[int, Member] = {}
        #: True once the run has started: all expected processes had joined.
        self.started = False

    def of(self, role: str) -> dict[str, Member]:
        """Return the servers or the workers."""
        return self.servers if role == "server" else self.workers

    def names(self, role: str) -> list[str]:
        """Return the names of the members of `role` that are part of the run, in the order of their numbers."""
        return sorted((name for name, member in self.of(role).items() if member.active), key=number_of)

    def add(self, member: Member) -> None:
        self.members[member.name] = self.of(member.hello.role)[member.name] = self.incarnations[member.incarnation] = member

    def remove(self, member: Member) -> None:
        del self.members[member.name], self.of(member.hello.role)[member.name], self.incarnations[member.incarnation]

    def lost_server(self, index: int | None) -> Member | None:
        """Return lost server `index`, or any lost server if `index` is None. Return None if there is none."""
        return next((m for m in self.servers.values() if m.lost and index in (None, number_of(m.name))), None)

    def newest_round(self) -> int:
        """Return the newest round that a worker has reached."""
        return max([member.reached for member in self.workers.values()], default=0)


class Backups:
    """Knows from servers' heartbeats which shards have a whole copy."""

    def __init__(self, settings: Settings, roster: Roster) -> None:
        self._settings = settings
        self._roster = roster

    def exists(self, server: Member) -> bool:
        """Return whether the backup has a whole copy of a lost server's shard."""
        backup = self._server_with(server)
        return backup is not None and number_of(server.name) in backup.heartbeat.replicas_held

    def exist_for_all(self) -> bool:
        """Return whether there is a whole copy of each shard whose server is lost, or replaced and not yet at work."""
        servers = self._roster.servers.values()
        needed = [server for server in servers if server.lost or (server.replaces and server.heartbeat.round < 0)]
        return all(map(self.exists, needed))

    def may_exist(self, member: Member, now: float) -> bool:
        """Return whether the backup may have a copy that the coordinator has not heard of yet."""
        backup = self._server_with(member)
        return backup is not None and not backup.heartbeat.state and backup.heard_at > now - DEAD_S

    def _server_with(self, member: Member) -> Member | None:
        """Return the backup of server `member`, or None if there is none or it is not part of the run."""
        if not self._settings.replicas or not self._roster.started or member.hello.role != "server":
            return None
        backup = self._roster.servers.get(f"server-{(number_of(member.name) + 1) % self._settings.servers}")
        return backup if backup is not None and backup.active else None
