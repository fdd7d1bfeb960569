"""The members of a run: what is known of each, and where they are found."""

from __future__ import annotations

from dataclasses import dataclass, field

from roundtable.common.config.settings import Settings
from roundtable.common.protocol.effects import number_of
from roundtable.common.protocol.messages.session import Heartbeat, Hello, Stop
from roundtable.common.runtime.errors import printable

#: A member that has been silent for so many seconds is dead if another process is there to take its place.
DEAD_S = 1.5


@dataclass
class Member:
    """A process that has joined."""

    name: str
    hello: Hello
    incarnation: int
    heard_at: float
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    #: Since when it has computed `heartbeat.micro_batch`.
    since: float = 0.0
    #: It said goodbye.
    left: bool = False
    #: It fell silent, died or was dismissed.
    lost: bool = False
    #: It left, and others do the rest of its work.
    early: bool = False
    #: The rounds that were in a worker's model when its script ended by itself, or -1.
    ended_at: int = -1
    #: Why the script failed after the last round, or ''.
    failed: str = ""
    #: It is a server in the place of a lost one.
    replaces: bool = False
    #: It takes part: it was there at the start, or has sent something else than a Hello.
    proven: bool = True
    #: The newest membership epoch that it was told of because it did not know it.
    epoch_announced: int = 0
    #: When that was.
    announced_at: float = 0.0

    @property
    def who(self) -> str:
        """Return what people are told of it: 'worker-0 on HOST'."""
        return f"{self.name} on {self.hello.host or 'an unknown host'}"

    @property
    def called(self) -> str:
        """Return the member's name and host as printable text."""
        host = printable(self.hello.host)
        return f"{self.name} on {host}" if host else self.name

    @property
    def active(self) -> bool:
        """Return whether it is part of the run."""
        return self.proven and not self.left and not self.lost

    @property
    def reached(self) -> int:
        """Return the round that a worker is in. It may compute a micro-batch of an earlier one."""
        return max(self.heartbeat.reached, self.heartbeat.round)

    def fence(self) -> Stop:
        """Return what this member is told once it is lost, whatever it sends: to restart, because others do its work."""
        return Stop(False, f"{self.name} missed its heartbeats and counts as dead; it rejoins under a new name.", restart=True)

    def keep_counts(self) -> None:
        """Keep of the last heartbeat of a member that is gone only what the summary counts, and where it was."""
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
        #: By name.
        self.members: dict[str, Member] = {}
        #: The members that are servers, by name.
        self.servers: dict[str, Member] = {}
        #: The members that are workers, by name.
        self.workers: dict[str, Member] = {}
        self.incarnations: dict[int, Member] = {}
        #: Whether all expected processes have been there.
        self.started = False

    def of(self, role: str) -> dict[str, Member]:
        """Return the servers or the workers."""
        return self.servers if role == "server" else self.workers

    def names(self, role: str) -> list[str]:
        """Return the members of `role` that are part of the run, by number."""
        return sorted((name for name, member in self.of(role).items() if member.active), key=number_of)

    def add(self, member: Member) -> None:
        self.members[member.name] = self.of(member.hello.role)[member.name] = self.incarnations[member.incarnation] = member

    def remove(self, member: Member) -> None:
        del self.members[member.name], self.of(member.hello.role)[member.name], self.incarnations[member.incarnation]

    def lost_server(self, index: int | None) -> Member | None:
        """Return the lost server of that number, or any lost server, that another process is to replace."""
        return next((m for m in self.servers.values() if m.lost and index in (None, number_of(m.name))), None)

    def newest_round(self) -> int:
        """Return the newest round that a worker has reached."""
        return max([member.reached for member in self.workers.values()], default=0)


class Backups:
    """Knows from heartbeats of servers which backups there are."""

    def __init__(self, settings: Settings, roster: Roster) -> None:
        self._settings = settings
        self._roster = roster

    def exists(self, server: Member) -> bool:
        """Return whether another server has a whole backup of a lost server's shard."""
        backup = self._server_with(server)
        return backup is not None and number_of(server.name) in backup.heartbeat.replicas_held

    def may_exist(self, member: Member, now: float) -> bool:
        """Return whether there may be a backup of which the coordinator has not heard yet."""
        backup = self._server_with(member)
        return backup is not None and not backup.heartbeat.state and backup.heard_at > now - DEAD_S

    def _server_with(self, member: Member) -> Member | None:
        """Return the server after `member`, if it is to have a backup of the shard of `member`, and is part of the run."""
        if not self._settings.replicas or not self._roster.started or member.hello.role != "server":
            return None
        backup = self._roster.servers.get(f"server-{(number_of(member.name) + 1) % self._settings.servers}")
        return backup if backup is not None and backup.active else None
