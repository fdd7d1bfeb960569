"""The handler of each kind of message in a worker. The I/O thread calls all of this with the lock held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from roundtable.common.protocol.effects import COORDINATOR, Send
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.session import Heartbeat, MembershipUpdate, Reassign, Refused, Traffic
from roundtable.common.protocol.messages.setup import Accepted, PlanReply, SetupReply, SharedMemoryReply
from roundtable.common.protocol.transport import Frames
from roundtable.common.runtime.errors import ClusterError
from roundtable.worker.client.io_thread import IoThread
from roundtable.worker.loop.task_queue import TaskQueue
from roundtable.worker.reports import ReportQueue

Handler = Callable[[str, Any, Frames], None]


class ServerClient(Protocol):
    """A client for one kind of parameters on the servers: dense parameters, embedding rows, or sharded layers."""

    @property
    def idle(self) -> bool:
        """Whether servers have acknowledged all pushes."""

    @property
    def traffic(self) -> Traffic:
        """The client's traffic so far."""

    def replaced(self, server: int) -> None:
        """Continue with a new process in the place of a server."""

    def tick(self, now: float) -> list[Send]:
        """Return the messages to send now."""


def _ignore(sender: str, body: Body, frames: Frames) -> None:
    """Ignore a second answer to a question that was asked twice."""


class MessageRouter:
    """The handlers by kind of message, and the clients, which also follow the clock and the loss of servers."""

    def __init__(self, io: IoThread, tasks: TaskQueue, reports: ReportQueue, hear: Callable[[Heartbeat], None]) -> None:
        """`hear` is called with each heartbeat of the coordinator."""
        self._io = io
        self._tasks = tasks
        self._reports = reports
        self._clients: list[ServerClient] = []
        #: By kind of message, from the coordinator or a server: its handler.
        self._handlers: dict[type[Body], Handler] = {
            MembershipUpdate: self._know_members,
            Reassign: lambda sender, body, frames: self._tasks.reassigned(body),
            Heartbeat: lambda sender, body, frames: hear(body),
            Accepted: lambda sender, body, frames: self._reports.accepted(body),
            Refused: self._fail,
            SetupReply: _ignore,
            PlanReply: _ignore,
            SharedMemoryReply: _ignore,
        }
        #: By kind of message, from a server: its handler.
        self._of_servers: dict[type[Body], Handler] = {}
        #: The handler of all other messages from servers. It rejects kinds that it does not know.
        self._others: Handler = _ignore

    def add(self, client: ServerClient, handler: Handler, *kinds: type[Body]) -> None:
        """Let `handler` handle these kinds of servers' messages. Without kinds, it gets all that have no other handler."""
        self._clients.append(client)
        self._of_servers.update(dict.fromkeys(kinds, handler))
        if not kinds:
            self._others = handler

    def listen(self, handler: Handler, *kinds: type[Body]) -> None:
        """Let `handler` handle these kinds of the coordinator's messages."""
        self._handlers.update(dict.fromkeys(kinds, handler))

    def share_memory(self, handler: Callable[[str, SharedMemoryReply], None]) -> None:
        """Let `handler` handle servers' answers about shared memory."""
        self._handlers[SharedMemoryReply] = lambda sender, body, frames: handler(sender, body)

    def handle(self, sender: str, body: Body, frames: Frames) -> None:
        """Handle one message. Raises ClusterError if this worker is refused, WireError if the message does not fit."""
        kind = type(body)
        if (handler := self._handlers.get(kind)) is not None:
            handler(sender, body, frames)
        elif sender != COORDINATOR:
            self._of_servers.get(kind, self._others)(sender, body, frames)

    def replaced(self, server: int) -> None:
        """Continue with a new process in the place of a server."""
        self._tasks.forget_begun()
        for client in self._clients:
            client.replaced(server)

    def tick(self, now: float) -> list[Send]:
        """Return the messages to send now."""
        return [message for client in self._clients for message in client.tick(now)] + self._reports.tick(now)

    @property
    def idle(self) -> bool:
        """Whether servers have acknowledged all pushes."""
        return all(client.idle for client in self._clients)

    @property
    def traffic(self) -> Traffic:
        """The traffic of all clients so far."""
        each = [msgspec.structs.astuple(client.traffic) for client in self._clients]
        return Traffic(*map(sum, zip(*each, strict=True)))

    def _know_members(self, sender: str, body: MembershipUpdate, frames: Frames) -> None:
        if body.share_tables[-1].epoch > self._io.epoch:
            self._tasks.tables = body.share_tables
            self._io.epoch = body.share_tables[-1].epoch

    def _fail(self, sender: str, body: Refused, frames: Frames) -> None:
        raise ClusterError(body.reason if sender == COORDINATOR else f"{sender}: {body.reason}")
