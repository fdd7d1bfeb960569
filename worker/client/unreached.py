"""Which servers a worker has no connection to, so that users find out why it waits."""

from __future__ import annotations

import logging
import platform
from functools import partial
from typing import Any

from roundtable.common.network.reachability import UNREACHED_S, Reachability
from roundtable.common.protocol.effects import number_of
from roundtable.common.protocol.session import TELL_S
from roundtable.common.storage.event_log import some

log = logging.getLogger("roundtable.worker.link")

#: Unreachable servers that a Heartbeat names at most.
_MOST_UNREACHED = 100


class UnreachedServers:
    """Servers to which there has been no connection for a while."""

    def __init__(self) -> None:
        self._reach = Reachability()
        #: By number: the addresses of these servers.
        self._servers: dict[int, str] = {}
        self._reported_at = float("-inf")

    def watcher(self, key: str, address: str, now: float) -> partial[Any]:
        """Return a function that starts to watch a new socket, known by `key` from now on."""
        return partial(self._reach.watch, key, address, now)

    def forget(self, key: str) -> None:
        """Stop watching a socket."""
        self._reach.forget(key)

    def look(self, now: float, patience_s: float) -> bool:
        """Find out which servers cannot be reached, and return whether there are new ones. Warn once in a while."""
        found = self._reach.unreached(now, min(UNREACHED_S, patience_s))
        before, self._servers = self._servers, {number_of(name): address for name, address in found.items()}
        if self._servers and now >= self._reported_at + TELL_S:
            self._reported_at = now
            log.warning("there is no connection%s", self.text(" to "))
        return bool(self._servers.keys() - before.keys())

    @property
    def numbers(self) -> list[int]:
        """The numbers of these servers, at most 100."""
        return sorted(self._servers)[:_MOST_UNREACHED]

    def text(self, before: str = ", and cannot reach ") -> str:
        """Return which servers cannot be reached, at which address and from which host. Return '' if all can."""
        names = [f"server-{number} at {address}" for number, address in sorted(self._servers.items())]
        return f"{before}{some(names)} from {platform.node()}: see --listen and --advertise of the server" if names else ""
