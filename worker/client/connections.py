"""The sockets of a worker: one to the coordinator, and two to each server, one of them for tensors."""

from __future__ import annotations

import logging
import time
from typing import Any

import zmq

from roundtable.common.network.host_identity import is_own
from roundtable.common.protocol.effects import COORDINATOR, Send
from roundtable.common.protocol.messages.session import Heartbeat, Peer, Welcome
from roundtable.common.protocol.transport import ASK_AGAIN_S, Stamp, dealer, is_bulk, new_incarnation, send
from roundtable.worker.client.unreached import UnreachedServers

log = logging.getLogger("roundtable.worker.link")

#: Suffix of the name of a server's second socket, which carries tensors.
_BULK = "/bulk"


class Connections:
    """Sockets by name, and the names of the processes at their other ends. Only `is_near` is safe in a second thread."""

    def __init__(self, coordinator: str) -> None:
        """Connect to the coordinator at this address. Raises UsageError if it is not an address."""
        self.stamp = Stamp(sender="worker", incarnation=new_incarnation())
        self.unreached = UnreachedServers()
        self.servers: list[Peer] = []
        #: Polls all sockets, also those that are opened later.
        self.poller = zmq.Poller()
        self._context: zmq.Context[Any] = zmq.Context()
        self._sockets: dict[str, zmq.Socket[bytes]] = {COORDINATOR: dealer(self._context, coordinator)}
        self._names: dict[Any, str] = {self._sockets[COORDINATOR]: COORDINATOR}
        self.poller.register(self._sockets[COORDINATOR], zmq.POLLIN)
        #: The number by which servers recognise this worker.
        self._ticket = 0
        #: By socket: when this worker last introduced itself there.
        self._greeted: dict[str, float] = {}

    def name_of(self, sock: Any) -> str | None:
        """Return the name of the process at the other end. Return None if a new process has taken that server's place."""
        return self._names.get(sock)

    def is_near(self, server: int) -> bool:
        """Return whether messages to a server stay on this host."""
        return is_own(self.servers[server].address)

    def introduce(self, welcome: Welcome) -> None:
        """Use the name that the coordinator gave to this worker from now on."""
        self.stamp.sender, self.stamp.run, self._ticket = welcome.process, welcome.run, welcome.ticket

    def connect(self, servers: list[Peer]) -> list[int]:
        """Connect to the servers that are new processes, and return their numbers. `servers` are all."""
        before, self.servers = self.servers, servers
        others = [number for number, peer in enumerate(servers) if not before or before[number] != peer]
        for number in others:
            self._connect(number, servers[number])
        return others

    def _connect(self, number: int, peer: Peer) -> None:
        name = f"server-{number}"
        for key in (name, name + _BULK):
            if (old := self._sockets.get(key)) is not None:
                self.poller.unregister(old)
                del self._names[old]
                self.unreached.forget(key)
                old.close(linger=0)
            watch = self.unreached.watcher(key, peer.address, time.monotonic()) if key == name else None
            sock = self._sockets[key] = dealer(self._context, peer.address, watch)
            self._names[sock] = name
            self.poller.register(sock, zmq.POLLIN)
            self._greeted.pop(key, None)
            self._greet(key)

    def _greet(self, key: str) -> None:
        """Introduce this worker on a connection, unless it has done so a moment ago.

        ZeroMQ may have reconnected without notice. Until a server knows whose connection it is, it accepts less than gradients
        need.
        """
        now = time.monotonic()
        if now >= self._greeted.get(key, float("-inf")) + ASK_AGAIN_S:
            self._greeted[key] = now
            send(self._sockets[key], self.stamp.encode(Heartbeat(), self._ticket))

    def send(self, message: Send, copy: bool) -> None:
        """Send a message. Its frames are copied first only if `copy`."""
        if message.to == COORDINATOR:
            send(self._sockets[COORDINATOR], self.stamp.encode(message.body), message.frames, copy=copy)
            return
        key = message.to + _BULK * is_bulk(message.body, message.frames)
        if message.frames:
            self._greet(key)
        send(self._sockets[key], self.stamp.encode(message.body, self._ticket), message.frames, copy=copy)

    def close(self) -> None:
        """Close all sockets. Messages that are left to send have one second at most."""
        self._context.destroy(linger=1000)
