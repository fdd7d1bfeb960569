"""Find out which of a process's peers can be reached.

ZeroMQ connects, and tries again, by itself and silently. Its monitor says here when a connection exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

#: Seconds without a connection after which an address counts as unreachable.
UNREACHED_S = 10.0
#: Seconds between two looks.
_LOOK_S = 0.25


@dataclass
class _Watched:
    address: str
    sock: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    #: The time since which there is no connection; None if there is one.
    since: float | None


class Reachability:
    """Sockets by name. It belongs to the thread of the sockets."""

    def __init__(self) -> None:
        self._watched: dict[str, _Watched] = {}
        self._looked_at = float("-inf")

    def watch(self, name: str, address: str, now: float, sock: zmq.Socket[bytes]) -> None:
        """Watch a socket that is about to connect to `address`, in place of an earlier one of that name."""
        self.forget(name)
        monitor = sock.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._watched[name] = _Watched(address, sock, monitor, now)

    def forget(self, name: str) -> None:
        """Stop watching a socket, before it is closed."""
        watched = self._watched.pop(name, None)
        if watched is not None:
            watched.sock.disable_monitor()
            watched.monitor.close(linger=0)

    def unreached(self, now: float, patience_s: float = UNREACHED_S) -> dict[str, str]:
        """Return the addresses, by name, without a connection for `patience_s` seconds."""
        if now >= self._looked_at + _LOOK_S:
            self._looked_at = now
            for watched in self._watched.values():
                _follow(watched, now)
        there = self._watched.items()
        return {name: one.address for name, one in there if one.since is not None and now - one.since >= patience_s}


def _follow(watched: _Watched, now: float) -> None:
    while watched.monitor.poll(0):
        event: Any = recv_monitor_message(watched.monitor)
        if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            watched.since = None
        elif watched.since is None:
            watched.since = now
