"""Addresses: the address that a process tells others, and waiting for names to resolve.

This file is about text and the host's own network. The sockets of messages are in `common/protocol/transport.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import logging
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from roundtable.common.runtime.errors import ClusterError, UsageError

log = logging.getLogger("roundtable.common.addresses")

#: Where a coordinator listens by default.
_PORT = 5555
#: Seconds between two tries to resolve a name, and between two lines about it.
_TRY_S = 1.0
_TELL_S = 10.0
#: Addresses behind the default route, to which no packet is ever sent.
_FAR = ((socket.AF_INET, ("192.0.2.1", 9)), (socket.AF_INET6, ("2001:db8::1", 9)))
_SIOCGIFADDR = 0x8915
_INET6 = Path("/proc/net/if_inet6")
_ADVERTISED = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^:/\[\]\s*]+)(?::([0-9]{1,5}))?", re.ASCII)


def split(address: str) -> tuple[str, int]:
    """Return the host, without brackets, and the port of tcp://HOST:PORT. Raise ValueError for anything else."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


def join(host: str, port: int) -> str:
    """Make tcp://HOST:PORT."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def whole(address: str) -> str:
    """Make tcp://HOST:PORT of the coordinator's address, of which HOST is enough."""
    if "://" in address:
        return address
    has_port = re.fullmatch(r"(\[[^\]]*\]|[^:]*):\d+", address) is not None
    return f"tcp://{address}" if has_port else f"tcp://{address}:{_PORT}"


def is_loopback(address: str) -> bool:
    """Return True if an address means the host of the process that uses it."""
    with contextlib.suppress(ValueError):
        host, _ = split(address)
        if host == "localhost":
            return True
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    return False


def needs_ipv6(address: str) -> bool:
    """Return True if a socket that connects to `address` must speak IPv6. A name with an IPv4 address need not."""
    if "[" in address:
        return True
    try:
        ipaddress.ip_address(split(address)[0])
    except ValueError:
        return bool(families := _families(address)) and socket.AF_INET not in families
    return False


def _families(address: str) -> set[int]:
    try:
        host, port = split(address)
        return {found[0] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, ValueError):
        return set()


def await_route(address: str, patience_s: float, sleep: Callable[[float], None] = time.sleep) -> None:
    """Block until the host of the coordinator's `address` resolves and there is a route to it. It may start later.

    Say every 10 s what is missing. Raise ClusterError after `patience_s` seconds.
    """
    began = told_at = time.monotonic()
    while problem := _problem(address):
        now = time.monotonic()
        if now >= began + patience_s:
            raise ClusterError(f"{problem}; --start-timeout sets how long to wait for that.")
        if now >= told_at + _TELL_S:
            told_at = now
            log.warning("%s; trying again, %.0f s so far", problem, now - began)
        sleep(_TRY_S)


def _problem(address: str) -> str:
    """Return why nothing can be sent to the coordinator's `address`, or ''."""
    try:
        _source(*_target(address))
    except socket.gaierror as error:
        return f"the coordinator's address {address} cannot be resolved on {socket.gethostname()}: {error.strerror or error}"
    except OSError as error:
        return f"there is no route from {socket.gethostname()} to the coordinator at {address}: {error.strerror or error}"
    return ""


def _target(address: str) -> tuple[int, Any]:
    """Return the family and socket address of the host that `address` names, of IPv4 if it has one."""
    host, port = split(address)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    family, _, _, _, target = min(found, key=lambda one: one[0] != socket.AF_INET)
    return family, target


def _source(family: int, target: Any) -> str:
    """Return the address of this host from which packets for `target` would be sent. Raise OSError if there is none."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing; picks the route
        return str(probe.getsockname()[0])


def advertised(bound: str, towards: str) -> str:
    """Return the address at which others reach the listener `bound`.

    A wildcard host becomes this host's address towards `towards`. If that is a loopback address, any other address of this host
    takes its place. Raise ClusterError if nothing can be sent to `towards`.
    """
    host, port = split(bound)
    if host not in ("0.0.0.0", "::", "*", ""):
        return bound
    try:
        own = _source(*_target(towards))
    except (OSError, ValueError) as error:
        raise ClusterError(f"the coordinator's address {towards} cannot be resolved: {error}.") from None
    return join(outward() or own, port) if is_loopback(join(own, port)) else join(own, port)


def outward() -> str | None:
    """Return an address of this host that others can use: of the default route, else of any interface, else None."""
    for found in (*_by_default_route(), *_of_interfaces()):
        if not is_loopback(join(found, 0)):
            return found
    return None


def _by_default_route() -> Iterator[str]:
    for family, target in _FAR:
        with contextlib.suppress(OSError):
            yield _source(family, target)


def _of_interfaces() -> Iterator[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # the interface has no IPv4 address
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                yield socket.inet_ntoa(answer[20:24])
    with contextlib.suppress(OSError):
        for line in _INET6.read_text(encoding="ascii").splitlines():
            digits, _, _, scope, *_ = line.split()
            if scope == "00":  # global
                yield str(ipaddress.IPv6Address(bytes.fromhex(digits)))


def to_advertise(advertise: str, bound: str) -> str:
    """Return the address that HOST, HOST:PORT or tcp://HOST:PORT stands for. Without a port, it is that of the listener at
    `bound`.

    Raise UsageError for anything else.
    """
    text = advertise.removeprefix("tcp://")
    with contextlib.suppress(ValueError):
        text = f"[{ipaddress.IPv6Address(text)}]"
    found = _ADVERTISED.fullmatch(text)
    host, port = found.groups() if found is not None else ("", None)
    if not host or host.strip("[]") in ("0.0.0.0", "::") or int(port or 1) not in range(1, 65536):
        raise UsageError(
            f"'{advertise}' is no address that others could reach: it looks like HOST, HOST:PORT or tcp://HOST:PORT."
        )
    return f"tcp://{host}:{port or split(bound)[1]}"
