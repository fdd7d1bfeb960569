"""The messages that tell members their names, the servers, and the shares."""

from __future__ import annotations

from roundtable.common.config.settings import Settings
from roundtable.common.protocol.effects import number_of
from roundtable.common.protocol.messages.session import MembershipUpdate, Peer, Welcome
from roundtable.common.protocol.tickets import ticket
from roundtable.ps.coordinator.state.roster import Member, Roster
from roundtable.ps.coordinator.state.share_tables import ShareTables


class Introductions:
    """Makes the messages for members that join, and for workers after a change."""

    def __init__(
        self, settings: Settings, run: str, run_dir: str, resume: int, key: bytes, roster: Roster, share_tables: ShareTables
    ) -> None:
        """Tickets are made with `key`. If `resume` is not -1, the run goes on from the checkpoint of that round in `run_dir`."""
        self._settings = settings
        self._run = run
        self._run_dir = run_dir
        self._resume = resume
        self._key = key
        self._roster = roster
        self._share_tables = share_tables
        #: The update after which the run ends because a script has asked for it; -1 if it is not decided.
        self.ends_after = -1

    @property
    def peers(self) -> list[Peer]:
        """Return all servers in the order of their numbers, with the incarnations by which servers know each other."""
        members = sorted(self._roster.servers.values(), key=lambda member: number_of(member.name))
        return [Peer(member.hello.address, member.incarnation) for member in members]

    @property
    def peers_of_workers(self) -> list[Peer]:
        """Return all servers for workers, with tickets: a worker that knew an incarnation could speak in the server's name."""
        return [Peer(peer.address, ticket(self._key, f"server {peer.incarnation}")) for peer in self.peers]

    @property
    def shares(self) -> MembershipUpdate:
        """Return the share tables and servers for workers."""
        return MembershipUpdate(self._share_tables.tables, self.peers_of_workers)

    def welcome(self, member: Member) -> Welcome:
        """Return the welcome of a member to a run that has started."""
        told = self._run, self._settings
        if member.hello.role == "worker":
            return Welcome(
                member.name, *told, self.peers_of_workers, self._share_tables.tables, self._run_dir, self._resume,
                ticket=ticket(self._key, member.name), ends_after=self.ends_after,
            )  # fmt: skip
        return Welcome(
            member.name, *told, self.peers, self._share_tables.tables, self._run_dir, self._resume, member.replaces,
            key=self._key, ends_after=self.ends_after,
        )  # fmt: skip
