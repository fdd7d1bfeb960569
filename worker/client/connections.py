"""The sockets of a worker: one to the coordinator, and two to each server, of which one carries tensors."""

from __future__ import annotations

import logging
import time
from typing import Any, Protocol

import zmq

from roundtable.common.network.host_identity import is_own
from roundtable.common.protocol.effects import COORDINATOR, Send
from roundtable.common.protocol.messages.session import Heartbeat, Peer, Welcome
from roundtable.common.protocol.transport import ASK_AGAIN_S, Stamp, dealer, is_bulk, new_incarnation, send
from roundtable.worker.client.unreached import UnreachedServers

log = logging.getLogger("roundtable.worker.link")

#: Ending of the name of a server's second socket, which tensors go by.
_BULK = "/bulk"


class Poller(Protocol):
    """The part of `zmq.Poller` that is needed here."""

    def register(self, socket: Any, flags: int = ...) -> None: ...

    def unregister(self, socket: Any) -> None: ...


class Connections:
    """Sockets by name, and the names of those at their other ends. One thread uses them, but for `is_near`."""

    def __init__(self, coordinator: str) -> None:
        """Connect to the coordinator at this address. Raises UsageError if it is none."""
        self.stamp = Stamp(sender="worker", incarnation=new_incarnation())
        self.unreached = UnreachedServers()
        self.servers: list[Peer] = []
        self._context: zmq.Context[Any] = zmq.Context()
        self._sockets: dict[str, zmq.Socket[bytes]] = {COORDINATOR: dealer(self._context, coordinator)}
        self._names: dict[Any, str] = {self._sockets[COORDINATOR]: COORDINATOR}
        self._poller: Poller = zmq.Poller()
        #: The name by which servers know this worker.
        self._ticket = 0
        #: When this worker last said at each socket whose it is.
        self._greeted: dict[str, float] = {}

    def attach(self, poller: Poller) -> None:
        """Have `poller` poll the sockets that there are and will be."""
        self._poller = poller
        for sock in self._sockets.values():
            poller.register(sock, zmq.POLLIN)

    def name_of(self, sock: Any) -> str | None:
        """Return who is at the other end; None if that server is another process since."""
        return self._names.get(sock)

    def is_near(self, server: int) -> bool:
        """Whether what is sent to a server stays on this host."""
        return is_own(self.servers[server].address)

    def introduce(self, welcome: Welcome) -> None:
        """Have the name from now on that the coordinator gave to this worker."""
        self.stamp.sender, self.stamp.run, self._ticket = welcome.process, welcome.run, welcome.ticket

    def connect(self, servers: list[Peer]) -> list[int]:
        """Connect to those of all servers that are other processes than before, and return their numbers."""
        before, self.servers = self.servers, servers
        others = [number for number, peer in enumerate(servers) if not before or before[number] != peer]
        for number in others:
            self._connect(number, servers[number])
        return others

    def _connect(self, number: int, peer: Peer) -> None:
        name = f"server-{number}"
        for key in (name, name + _BULK):
            if (old := self._sockets.get(key)) is not None:
                self._poller.unregister(old)
                del self._names[old]
                self.unreached.forget(key)
                old.close(linger=0)
            watch = self.unreached.watcher(key, peer.address, time.monotonic()) if key == name else None
            sock = self._sockets[key] = dealer(self._context, peer.address, watch)
            self._names[sock] = name
            self._poller.register(sock, zmq.POLLIN)
            self._greeted.pop(key, None)
            self._greet(key)

    def _greet(self, key: str) -> None:
        """Say whose connection it is, unless this worker said so a moment ago.

        ZeroMQ may have made the connection anew without a word, and from a stranger's a server takes less than gradients need.
        """
        now = time.monotonic()
        if now >= self._greeted.get(key, float("-inf")) + ASK_AGAIN_S:
            self._greeted[key] = now
            send(self._sockets[key], self.stamp.encode(Heartbeat(), self._ticket))

    def send(self, message: Send, copy: bool) -> None:
        """Send a message, and unless `copy` its frames without copying."""
        if message.to == COORDINATOR:
            send(self._sockets[COORDINATOR], self.stamp.encode(message.body), message.frames, copy=copy)
            return
        key = message.to + _BULK * is_bulk(message.body, message.frames)
        if message.frames:
            self._greet(key)
        send(self._sockets[key], self.stamp.encode(message.body, self._ticket), message.frames, copy=copy)

    def close(self) -> None:
        """Close all sockets, after a second at most in which what is left to send goes out."""
        self._context.destroy(linger=1000)
