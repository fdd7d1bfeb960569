"""A run on two hosts, which are network namespaces, and what can happen to the network between them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import network
from benchmarks.live import LAUNCH, Cluster
from cluster.processes import Processes
from common.errors import UsageError

#: Where workers and servers of both hosts find the coordinator; and a proxy's port.
_PORT, _PROXY_PORT = 5555, 5556
#: A host has a name of its own: processes with the same number on another are others.
_NAMED = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"')
#: Before a command that is to end when this process does.
_WITH_US = ("setpriv", "--pdeathsig", "KILL")
#: Seconds for the proxy to listen.
_LISTENS_S = 20.0


class Spread(Cluster):
    """A coordinator and servers on one host, and workers on both or the other one, started one by one."""

    def __init__(
        self, folder: Path, processes: Processes, hosts: list[network.Host], servers: int, near: int, far: int, *flags: object
    ):
        """`near` workers are on the coordinator's host, `far` ones on the other."""
        self.hosts, self.processes = hosts, processes
        address = f"tcp://{hosts[0].address}:{_PORT}"
        size = ("--servers", servers, "--workers", near + far)
        bind = ("--bind", address, "--run-dir", folder)
        super().__init__(folder, *bind, *size, *flags, command="coordinator", prefix=(*_WITH_US, *self._on(0)))
        for number in range(servers):
            self._start(f"server-{number}", 0, "server", "--coordinator", address)
        for number in range(near + far):
            self._start(f"worker-{number}", int(number >= near), "worker", "--coordinator", address)

    def _on(self, host: int) -> tuple[str, ...]:
        return (*self.hosts[host].prefix, *_NAMED, f"host{host}")

    def _start(self, name: str, host: int, *command: str) -> None:
        number = name.rpartition("-")[2]
        self.processes.start(name, [*self._on(host), sys.executable, str(LAUNCH), *command, "--index", number])

    def pids(self) -> dict[str, int]:
        return {}  # each process has a numbering of its own

    def left_behind(self) -> dict[str, int]:
        return {}

    def firewall(self, host: int, *rule: str) -> None:
        _run("ip", "netns", "exec", self.hosts[host].prefix[3], "iptables", *rule)


Change = Callable[[Spread], None]


@contextlib.contextmanager
def hosts(logs: Path) -> Iterator[tuple[list[network.Host], Processes]]:
    """Two hosts, and what starts processes on them; nothing is left of either."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with network.hosts("1gbit") as made, Processes(logs, env) as processes:
        yield made, processes


def cut(seconds: float, both_ways: bool, heals: bool = True) -> Change:
    """What worker-2, alone on its host, sends to server-1 is lost for so long, or unless it `heals` for ever; `both_ways`: what
    server-1 sends to it is, too."""

    def harm(run: Spread) -> None:
        told = [event.data["address"] for event in run.events("joined") if event.process == "server-1"]
        port = told[-1].rpartition(":")[2]
        run.firewall(1, "-A", "OUTPUT", "-p", "tcp", "--dport", port, "-j", "DROP")
        if both_ways:
            run.firewall(1, "-A", "INPUT", "-p", "tcp", "--sport", port, "-j", "DROP")
        if heals:
            time.sleep(seconds)
            run.firewall(1, "-F")

    return harm


def cut_off(run: Spread) -> None:
    """Nothing gets from worker-2, alone on its host, to server-1 any more. Others have to do without it."""
    cut(0.0, both_ways=False, heals=False)(run)
    run.until(lambda: any(event.process == "worker-2" for event in run.events("lost")), "giving up of worker-2")


def delay(made: list[network.Host], processes: Processes, seconds: float) -> None:
    """All that goes between the hosts takes so long, in each direction. Called before a run is started."""
    prefix = made[0].prefix
    listens = ("-m", "benchmarks.proxy", str(_PROXY_PORT), str(seconds))
    proxy = processes.start("proxy", [*prefix, sys.executable, *listens], PYTHONPATH=str(LAUNCH.parent))
    inside = ("ip", "netns", "exec", prefix[3])
    deadline = time.monotonic() + _LISTENS_S
    while f":{_PROXY_PORT} " not in subprocess.run([*inside, "ss", "-ltn"], capture_output=True, text=True, check=False).stdout:
        if time.monotonic() > deadline:
            raise UsageError(f"the proxy does not listen after {_LISTENS_S:.0f} s; its log is {proxy.log}.")
        time.sleep(0.1)
    redirect = ("-j", "REDIRECT", "--to-ports", str(_PROXY_PORT))
    _run(*inside, "iptables", "-t", "nat", "-A", "PREROUTING", "-i", made[0].interface, "-p", "tcp", *redirect)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"'{' '.join(command)}' failed: {done.stderr.strip()}")
