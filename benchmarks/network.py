"""Hosts to run on: this machine as it is, or two network namespaces joined by links of a given rate.

Each host of a network has one end of a veth pair; the other ends are ports of a bridge. Both directions of a host's link are
limited by a token bucket.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from roundtable.cluster.process.parent_death import PARENT_VARIABLE
from roundtable.common.runtime.errors import UsageError

HOSTS = 2
LOOPBACK = "loopback"
#: Networks besides the loopback, and tc's word for their rate.
RATES: Mapping[str, str] = {"1gbit": "1gbit", "100mbit": "100mbit"}

_INTERFACE = "veth0"
#: Makes each command line a machine of its own: it sees no process of others, nor its parent, and so cannot reach their memory.
_ALONE = ("unshare", "--fork", "--pid", "--mount-proc", "--kill-child", "env", "--unset", PARENT_VARIABLE)
#: Names of namespaces, ports and bridges. They have the id of the process that has made them.
_OURS = re.compile(r"\b(?:bench|bn)(\d+)(?:h\d+|br)\b")


@dataclass(frozen=True)
class Host:
    """A host for processes. `prefix` goes before their command lines."""

    address: str
    interface: str
    prefix: tuple[str, ...] = ()


@contextlib.contextmanager
def hosts(network: str) -> Iterator[list[Host]]:
    """Yield two hosts on `network`, and remove them at the end. On the loopback both hosts are this machine.

    Raises UsageError if the network cannot be made. The message says what is missing.
    """
    if network == LOOPBACK:
        yield [Host("127.0.0.1", "lo")] * HOSTS
        return
    if shutil.which("ip") is None or shutil.which("tc") is None:
        raise UsageError(f"--network {network} needs the programs ip and tc: install iproute2.")
    if os.geteuid() != 0:
        raise UsageError(f"--network {network} makes network namespaces, for which it must be run as root.")
    remove_stale()
    try:
        yield _make(os.getpid(), RATES[network])
    finally:
        _remove(os.getpid())


def _make(number: int, rate: str) -> list[Host]:
    bridge = _bridge(number)
    _run("ip", "link", "add", bridge, "type", "bridge")
    _run("ip", "link", "set", bridge, "up")
    made = []
    for index in range(HOSTS):
        name, port = _namespace(number, index), _port(number, index)
        inside = ("ip", "netns", "exec", name)
        address = f"10.99.0.{index + 1}"
        _run("ip", "netns", "add", name)
        _run("ip", "link", "add", port, "type", "veth", "peer", "name", _INTERFACE, "netns", name)
        _run("ip", "link", "set", port, "master", bridge, "up")
        _run(*inside, "ip", "addr", "add", f"{address}/24", "dev", _INTERFACE)
        _run(*inside, "ip", "link", "set", _INTERFACE, "up")
        _run(*inside, "ip", "link", "set", "lo", "up")
        limit = ("root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms")
        _run("tc", "qdisc", "add", "dev", port, *limit)  # what the host receives
        _run(*inside, "tc", "qdisc", "add", "dev", _INTERFACE, *limit)  # what it sends
        made.append(Host(address, _INTERFACE, (*inside, *_ALONE)))
    return made


def _remove(number: int) -> None:
    """Remove everything that `_make` has made, even if it stopped halfway."""
    commands = [["ip", "link", "del", _port(number, index)] for index in range(HOSTS)]
    commands += [["ip", "netns", "del", _namespace(number, index)] for index in range(HOSTS)]
    commands.append(["ip", "link", "del", _bridge(number)])
    for command in commands:
        subprocess.run(command, check=False, capture_output=True)


def remove_stale() -> None:
    """Remove the networks of processes that were killed. Do nothing if this process may not make networks."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return
    listed = ""
    for command in (["ip", "netns", "list"], ["ip", "-o", "link"]):
        listed += subprocess.run(command, check=False, capture_output=True, text=True).stdout
    for number in {int(found) for found in _OURS.findall(listed)}:
        if not _is_there(number):
            _remove(number)


def _is_there(number: int) -> bool:
    """Return whether a benchmark has this process id and lives. Another program may have got the id."""
    try:
        return b"benchmarks" in Path(f"/proc/{number}/cmdline").read_bytes()
    except OSError:
        return False


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise UsageError(f"the network cannot be made here: '{' '.join(command)}' failed{': ' + said[-1] if said else ''}.")


def _namespace(number: int, index: int) -> str:
    return f"bench{number}h{index}"


def _port(number: int, index: int) -> str:
    return f"bn{number}h{index}"


def _bridge(number: int) -> str:
    return f"bn{number}br"
