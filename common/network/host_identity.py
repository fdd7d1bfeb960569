"""Where a process is, as far as others must know it. Names of hosts prove nothing: two may have the same one, and one several."""

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
    """Two processes with the same `pids` can look each other up by process id; two with the same `network` mean the same by a
    loopback address. Each is '' where the system does not tell, and then equals nobody's."""

    pids: _Mark = ""
    network: _Mark = ""

    def sees(self, other: Place) -> bool:
        """Whether the process ids of one mean the same to the other."""
        return bool(self.pids) and self.pids == other.pids

    def cannot_reach(self, other: Place) -> bool:
        """Whether it is certain that the loopback address of one is not the other's."""
        return bool(self.network) and bool(other.network) and self.network != other.network


def is_own(address: str) -> bool:
    """Whether `address`, tcp://HOST:PORT, is one of this host's own. False where that cannot be told."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        family, kind, _, _, found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(found)  # sends nothing
            return bool(probe.getsockname()[0] == probe.getpeername()[0])
    except (OSError, ValueError):
        return False


#: Of who has not said.
NOWHERE = Place()


@cache
def here() -> Place:
    """The place of this process: on Linux the boot of the kernel and the namespaces that it is in."""
    if not sys.platform.startswith("linux"):
        host = f"{uuid.getnode():x}"
        return Place(host, host)
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        own = str((_PROC / "self").readlink()) == str(os.getpid())  # else /proc is that of another namespace
        pids, network = (f"{boot}/{(_PROC / 'self/ns' / kind).readlink()}" for kind in ("pid", "net"))
    except (OSError, UnicodeDecodeError):
        return NOWHERE
    return Place(pids if own else "", network)
