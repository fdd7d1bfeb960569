"""Bounds on the memory that strangers, and peers that do not read, can take up in a listening process.

ZeroMQ keeps a message until its last frame has come, and its high-water marks count messages, not bytes. A peer that never ends a
message, or never reads, would fill the memory. For each connection, `Inflow` compares the bytes that the kernel has received with
those that came out of the socket. If too much is in between, it shuts the connection down. `Outflow` counts the bytes that were
handed to the socket for a peer until they are sent, and accepts no more if they are too many.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
from collections import deque
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from roundtable.common.protocol.rejections import Rejections
from roundtable.common.protocol.transport import bytes_of, send
from roundtable.common.runtime.errors import WireError

#: Bytes that may be under way in one stranger's connection. As frames of two bytes they take up 32 times as much memory, and
#: half a
#: second to read.
_STRANGER_BYTES = 1 << 20
#: Bytes that may be under way in all strangers' connections.
_STRANGERS_BYTES = 16 << 20
#: Bytes that may be under way in a member's connection: embedding rows and blocks of keys come without credit.
_MEMBER_BYTES = 2 << 30
#: Strangers' connections may have this fraction (1/n) of the files that this process may open.
_STRANGERS_SHARE = 4
_MANY_FILES = 1 << 16
#: Seconds between two looks.
_LOOK_S = 0.05
#: Further seconds between two looks for each connection.
_LOOK_BY_CONNECTION_S = 5e-5
#: Offset in Linux's tcp_info of the number of bytes received (since 4.1).
_RECEIVED_AT = 128
#: Bytes that each peer may have under way for itself. Weights never exceed this; only answers to many pulls of keys come near it.
_OWN_BYTES = 16 << 20
#: Bytes that one peer may have under way.
_UNREAD_BYTES = 512 << 20
#: Bytes that all peers together may have under way above their own.
_UNREAD_IN_ALL = 1 << 30
#: Number of peers after which those with nothing under way are forgotten.
_PEERS = 1000


class Standing(IntEnum):
    """The standing of a message's sender: unknown, a process that asks to join and may, or a member of the run."""

    STRANGER = 0
    JOINING = 1
    MEMBER = 2


class _Connection:
    def __init__(self, fd: int) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=fd)
        #: Bytes that came out of the ZeroMQ socket.
        self.taken = 0
        #: The highest standing of any message that has come by this connection.
        self.standing = Standing.STRANGER
        self.shut = False

    def under_way(self) -> int:
        """Return the bytes that the kernel has received and that were not taken. Raises OSError if the kernel cannot tell."""
        info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED_AT + 8)
        if len(info) < _RECEIVED_AT + 8:
            raise OSError("this kernel does not tell")
        received: int = struct.unpack_from("Q", info, _RECEIVED_AT)[0]
        return received - self.taken


class Inflow:
    """The connections of a listening socket, oldest first.

    Call `took` with the frames of every message, and call `look` often.
    """

    def __init__(self, sock: zmq.Socket[bytes], refusals: Rejections) -> None:
        self._monitor = sock.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._sock = sock
        self._refusals = refusals
        self._connections: dict[int, _Connection] = {}
        self._looked_at = float("-inf")

    def took(self, frames: Iterable[Any], standing: Standing) -> None:
        """Note that a message of a sender of this standing has come out of the socket."""
        size, fd = 0, -1
        for frame in frames:
            size += len(frame) + (2 if len(frame) < 256 else 9)  # as ZMTP frames it
            with contextlib.suppress(zmq.ZMQError):  # not every frame knows its connection
                fd = frame.get(zmq.SRCFD)
        if fd >= 0 and fd not in self._connections and not self._monitor.closed:
            self._follow()
        connection = self._connections.get(fd)
        if connection is not None:
            connection.taken += size
            connection.standing = max(connection.standing, standing)

    def look(self, now: float, listening: bool = True) -> None:
        """Shut down connections with too much under way, and strangers' oldest connections if strangers have too many.

        A member shows its standing at once. Unless this process is `listening`, no sender can have shown it.
        """
        if now < self._looked_at + _LOOK_S + _LOOK_BY_CONNECTION_S * len(self._connections):
            return
        self._looked_at = now
        self._follow()
        strangers: list[tuple[int, _Connection]] = []
        for fd, connection in list(self._connections.items()):
            try:
                size = connection.under_way()
            except OSError:
                self._forget(fd)
                continue
            if connection.shut:
                continue
            if connection.standing < Standing.MEMBER and listening:
                strangers.append((size, connection))
            elif size > _MEMBER_BYTES:
                self._shut(connection, _too_much(size), now)
        total = sum(size for size, _ in strangers)
        for size, connection in sorted(strangers, key=lambda stranger: -stranger[0]):
            if size > _STRANGER_BYTES or total > _STRANGERS_BYTES:
                self._shut(connection, _too_much(size), now)
                total -= size
        nobody = [connection for _, connection in strangers if connection.standing == Standing.STRANGER and not connection.shut]
        for connection in nobody[: max(0, len(nobody) - _files() // _STRANGERS_SHARE)]:
            self._shut(connection, "the oldest connection of a stranger was shut, because strangers have too many", now)

    def _follow(self) -> None:
        """Note the connections that were made or have ended."""
        while self._monitor.poll(0):
            event: Any = recv_monitor_message(self._monitor)
            fd = int(event["value"])
            self._forget(fd)
            if event["event"] == zmq.EVENT_ACCEPTED:
                with contextlib.suppress(OSError):  # the connection has ended already
                    self._connections[fd] = _Connection(fd)

    def _forget(self, fd: int) -> None:
        connection = self._connections.pop(fd, None)
        if connection is not None:
            connection.socket.detach()  # ZeroMQ closes it

    def _shut(self, connection: _Connection, why: str, now: float) -> None:
        connection.shut = True
        try:
            connection.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return
        self._refusals.note(WireError(why, "flood"), now)

    def close(self) -> None:
        """Stop watching. Messages may still come by connections that are not watched."""
        for fd in list(self._connections):
            self._forget(fd)
        self._sock.disable_monitor()
        self._monitor.close(linger=0)


def _too_much(size: int) -> str:
    return f"a connection has brought {size >> 10} KiB without the end of a message, or more than can be taken, and was shut"


def _files() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MANY_FILES if soft == resource.RLIM_INFINITY else soft


class Outflow:
    """The bytes on their way to each peer of a ROUTER, by routing id, until they have left this process."""

    def __init__(self, refusals: Rejections) -> None:
        self._refusals = refusals
        self._under_way: dict[bytes, _Queue] = {}

    def send(self, sock: zmq.Socket[bytes], header: bytes, frames: Sequence[Any], to: bytes, now: float) -> bool | None:
        """Send a message with frames like `transport.send`.

        Return False if the receiver has not taken enough of earlier messages.
        """
        if not self._has_room(to):
            self._refusals.note(WireError("a peer does not read what it was sent, and is sent no more for now", "unread"), now)
            return False
        last = zmq.Frame(frames[-1], track=True, copy=False)  # frames leave in order
        sent = send(sock, header, [*frames[:-1], last], to=to)
        if sent:
            if len(self._under_way) > _PEERS:
                self._under_way = {peer: queue for peer, queue in self._under_way.items() if queue.left()}
            size = sum(bytes_of(frame).nbytes for frame in frames)
            self._under_way.setdefault(to, _Queue()).add(last.tracker, size)
        return sent

    def _has_room(self, to: bytes) -> bool:
        queue = self._under_way.get(to)
        left = queue.left() if queue is not None else 0
        if left < _OWN_BYTES or left >= _UNREAD_BYTES:
            return left < _OWN_BYTES
        return sum(max(0, other.left() - _OWN_BYTES) for other in self._under_way.values()) < _UNREAD_IN_ALL


class _Queue:
    """Messages on their way to a peer: a tracker that knows when one has left this process, and its bytes."""

    def __init__(self) -> None:
        self._messages: deque[tuple[Any, int]] = deque()
        self._bytes = 0

    def add(self, tracker: Any, size: int) -> None:
        self._messages.append((tracker, size))
        self._bytes += size

    def left(self) -> int:
        """Return the bytes that have not left this process."""
        while self._messages and self._messages[0][0].done:
            self._bytes -= self._messages.popleft()[1]
        return self._bytes
