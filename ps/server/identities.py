"""Checks that a message comes from the process that it names as its sender."""

from __future__ import annotations

import msgspec

from roundtable.common.protocol.envelope import Envelope
from roundtable.common.protocol.messages.replication import RequestState
from roundtable.common.protocol.messages.session import Peer
from roundtable.common.protocol.tickets import ticket
from roundtable.common.runtime.errors import WireError

#: The body of a replacement server's first message to its backup.
_RESTORE = msgspec.Raw(msgspec.msgpack.encode(RequestState()))


class Identities:
    """The workers and servers that may send messages to server `index`."""

    def __init__(self, index: int, key: bytes, servers: list[Peer]) -> None:
        """`key` is the key with which workers' tickets are made."""
        self._index, self.key, self.servers = index, key, servers
        #: By worker: its checked ticket. No name is used twice in a run.
        self.tickets: dict[str, int] = {}

    def neighbour(self, step: int) -> int:
        """Return the number of the server that is `step` after this one."""
        return (self._index + step) % len(self.servers)

    def check_worker(self, envelope: Envelope) -> None:
        """Raise WireError unless the coordinator has given the sender its name."""
        name = envelope.sender
        if self.tickets.get(name) != envelope.incarnation:
            if ticket(self.key, name) != envelope.incarnation:
                raise WireError(f"a process calls itself {name}, but the coordinator did not give it that name", "sender")
            self.tickets[name] = envelope.incarnation

    def is_server(self, envelope: Envelope, step: int) -> bool:
        """Return True if a message comes from the server that is `step` after this one. Raises WireError if it does not.

        Return False if a replacement server asks for its shard before the coordinator has announced it here.
        """
        number = self.neighbour(step)
        if envelope.sender != f"server-{number}":
            raise WireError(f"'{envelope.sender}' is neither a worker nor a neighbour of this server", "sender")
        if envelope.incarnation == self.servers[number].incarnation:
            return True
        if envelope.body == _RESTORE:
            return False  # the coordinator's list of servers is still under way; the replacement asks again
        raise WireError(f"a process calls itself {envelope.sender}, but another process is known by that name", "sender")
