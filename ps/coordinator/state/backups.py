"""Which servers have a backup of a lost server's shard."""

from __future__ import annotations

from roundtable.common.config.settings import Settings
from roundtable.ps.coordinator.state.roster import Member, Roster, number_of

#: A member that has been silent for so many seconds is dead if another process is there to take its place.
DEAD_S = 1.5


class Backups:
    """Knows from heartbeats of servers which backups there are."""

    def __init__(self, settings: Settings, roster: Roster) -> None:
        self._settings = settings
        self._roster = roster

    def exists(self, server: Member) -> bool:
        """Return whether another server has a whole backup of a lost server's shard."""
        backup = self._server_with(server)
        return backup is not None and number_of(server.name) in backup.beat.replicas_held

    def may_exist(self, member: Member, now: float) -> bool:
        """Return whether there may be a backup of which the coordinator has not heard yet."""
        backup = self._server_with(member)
        return backup is not None and not backup.beat.state and backup.heard_at > now - DEAD_S

    def _server_with(self, member: Member) -> Member | None:
        """Return the server after `member`, if it is to have a backup of the shard of `member`, and is part of the run."""
        if not self._settings.replicas or not self._roster.started or member.hello.role != "server":
            return None
        backup = self._roster.servers.get(f"server-{(number_of(member.name) + 1) % self._settings.servers}")
        return backup if backup is not None and backup.active else None
