"""Whether messages come from the processes whose names they bear."""

from __future__ import annotations

import msgspec

from roundtable.common.protocol.envelope import Envelope
from roundtable.common.protocol.messages.replication import RequestState
from roundtable.common.protocol.messages.session import Peer
from roundtable.common.protocol.tickets import ticket
from roundtable.common.runtime.errors import WireError

#: What the first message looks like of a server in another's place.
_RESTORE = msgspec.Raw(msgspec.msgpack.encode(RequestState()))


class Identities:
    """The workers and servers that server `index` has to do with."""

    def __init__(self, index: int, key: bytes, servers: list[Peer]) -> None:
        """`key` is what workers' tickets are made with."""
        self._index, self.key, self.servers = index, key, servers
        #: Tickets of workers that were heard of: no name is used twice in a run.
        self.tickets: dict[str, int] = {}

    def neighbour(self, step: int) -> int:
        """Return the server so many after this one."""
        return (self._index + step) % len(self.servers)

    def check_worker(self, envelope: Envelope) -> None:
        """Raise WireError unless the coordinator has given the worker its name."""
        name = envelope.sender
        if self.tickets.get(name) != envelope.incarnation:
            if ticket(self.key, name) != envelope.incarnation:
                raise WireError(f"a process calls itself {name}, which is not the name that the coordinator gave it", "sender")
            self.tickets[name] = envelope.incarnation

    def is_server(self, envelope: Envelope, step: int) -> bool:
        """Return True if a message comes from the server so many after this one. Raises WireError if it must not come."""
        number = self.neighbour(step)
        if envelope.sender != f"server-{number}":
            raise WireError(f"'{envelope.sender}' is no worker, and has no copy of a shard here", "sender")
        if envelope.incarnation == self.servers[number].incarnation:
            return True
        if envelope.body == _RESTORE:
            return False  # the coordinator's word of it is still under way, and it asks again
        raise WireError(f"a process calls itself {envelope.sender} and is another than the one known by that name", "sender")
