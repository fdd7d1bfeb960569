"""A server's sockets: to the coordinator, to the backup, and for workers and the server that connect here."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

import zmq

from roundtable.common.protocol.effects import BACKUP, COORDINATOR, Send
from roundtable.common.protocol.flow_limits import Outflow
from roundtable.common.protocol.messages.session import Heartbeat
from roundtable.common.protocol.transport import ASK_AGAIN_S, Stamp, dealer, is_bulk, is_worker, send


class Connections:
    """Sends the messages of state machines, each on the right connection."""

    def __init__(
        self,
        context: zmq.Context[Any],
        coordinator: zmq.Socket[bytes],
        workers: zmq.Socket[bytes],
        stamp: Stamp,
        outflow: Outflow,
    ) -> None:
        self._context, self._coordinator, self._workers = context, coordinator, workers
        self._stamp, self._outflow = stamp, outflow
        self.poller = zmq.Poller()
        #: The socket to the backup, or None in a run without replicas.
        self.backup: zmq.Socket[bytes] | None = None
        #: When this server last named itself to the backup.
        self._greeted_at = float("-inf")
        #: By peer and kind of message: the routing id of the connection for small messages (False) or for tensors (True).
        self.routes: dict[tuple[str, bool], bytes] = {}

    def connect_backup(self, address: str) -> None:
        """Connect to the backup at `address`, and close the connection to the old one."""
        if self.backup is not None:
            self.poller.unregister(self.backup)
            self.backup.close(linger=0)
        self.backup = dealer(self._context, address)
        self.poller.register(self.backup, zmq.POLLIN)
        self._greeted_at = float("-inf")

    def forget(self, lost: Collection[str]) -> None:
        """Forget the connections of lost workers."""
        self.routes = {key: route for key, route in self.routes.items() if key[0] not in lost}

    def send(self, effects: Sequence[Send]) -> None:
        """Send messages."""
        for effect in effects:
            # hide the incarnation from a worker, which could use it to speak to the coordinator in this server's name
            header = self._stamp.encode(effect.body, 0 if is_worker(effect.to) else None)
            if effect.to == COORDINATOR:
                send(self._coordinator, header, effect.frames)
            elif effect.to == BACKUP:
                if self.backup is not None:
                    self._greet(self.backup)
                    send(self.backup, header, effect.frames)
            else:
                self._to_peer(effect, header)

    def _greet(self, backup: zmq.Socket[bytes]) -> None:
        """Send the backup a heartbeat that names this server, unless one was sent less than ASK_AGAIN_S ago."""
        if (now := time.monotonic()) >= self._greeted_at + ASK_AGAIN_S:
            self._greeted_at = now
            send(backup, self._stamp.encode(Heartbeat()))

    def _to_peer(self, effect: Send, header: bytes) -> None:
        """Send on the peer's connection for this kind of message.

        If that connection is broken and its replacement has not sent anything, send on the peer's other connection.
        """
        bulk = is_bulk(effect.body, effect.frames)
        for key in ((effect.to, bulk), (effect.to, not bulk)):
            route = self.routes.get(key)
            if route is None:
                continue
            if effect.frames:
                sent = self._outflow.send(self._workers, header, effect.frames, route, time.monotonic())
            else:
                sent = send(self._workers, header, to=route)
            if sent is not None:
                return
            del self.routes[key]
