"""The place of a process, as far as others must know it. Host names prove nothing: two hosts may share one."""

from __future__ import annotations

import os
import socket
import sys
import uuid
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec

_PROC = Path("/proc")
_Mark = Annotated[str, msgspec.Meta(max_length=100)]


class Place(msgspec.Struct, frozen=True, array_like=True):
    """The place of one process.

    Two processes with the same `pids` can look each other up by process id. Two processes with the same `network` reach the same
    host by a loopback address. Each is '' if the system does not say, and then equals no other.
    """

    pids: _Mark = ""
    network: _Mark = ""

    def sees(self, other: Place) -> bool:
        """Return True if the process ids of one mean the same to the other."""
        return bool(self.pids) and self.pids == other.pids

    def cannot_reach(self, other: Place) -> bool:
        """Return True if the loopback address of one is certainly not the other's."""
        return bool(self.network) and bool(other.network) and self.network != other.network


def is_own(address: str) -> bool:
    """Return True if `address`, tcp://HOST:PORT, is one of this host's own, and False if that is unknown."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        family, kind, _, _, found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(found)  # sends nothing
            return bool(probe.getsockname()[0] == probe.getpeername()[0])
    except (OSError, ValueError):
        return False


#: The place of a process that has not told its own.
NOWHERE = Place()


@cache
def here() -> Place:
    """Return the place of this process: on Linux, the boot of the kernel and the process's namespaces."""
    if not sys.platform.startswith("linux"):
        host = f"{uuid.getnode():x}"
        return Place(host, host)
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        own = str((_PROC / "self").readlink()) == str(os.getpid())  # otherwise /proc belongs to another namespace
        pids, network = (f"{boot}/{(_PROC / 'self/ns' / kind).readlink()}" for kind in ("pid", "net"))
    except (OSError, UnicodeDecodeError):
        return NOWHERE
    return Place(pids if own else "", network)
