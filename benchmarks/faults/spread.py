"""A run on two hosts, which are network namespaces, and harms to the network between them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped,unused-ignore]

from benchmarks import LAUNCH, network
from benchmarks.live import Cluster
from roundtable.cluster.process.children import Processes
from roundtable.cluster.process.parent_death import PARENT_VARIABLE
from roundtable.common.runtime.errors import UsageError

#: The coordinator's port, and the proxy's.
_PORT, _PROXY_PORT = 5555, 5556
#: Gives the host a name of its own, so that equal process ids on two hosts mean different processes.
_NAMED = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"')
#: The words before a command that must end with this process.
_WITH_US = ("setpriv", "--pdeathsig", "KILL")
#: Makes a host whose processes see each other and have their own process ids.
_SHARED = ("unshare", "--fork", "--pid", "--uts", "--mount-proc", "--kill-child", "sh", "-c", 'hostname "$0" && exec sleep 1d')
#: Gives a command the process id $0.
_NUMBERED = ("sh", "-c", 'echo $(($0 - 1)) > /proc/sys/kernel/ns_last_pid && { "$@" & wait $!; }')
#: Seconds for which processes are stopped: longer than the heartbeat timeout between hosts.
_STOPPED_S = 18.0
#: The server with a fixed port, and that port.
_FIXED, _FIXED_PORT = "server-1", 6001
#: Host names of the coordinator and of that server.
_HEAD, _STORE = "head.test", "store.test"
#: Seconds for which each of these names is unknown.
_UNKNOWN_S = 12.0
#: Makes a command look names up in the file $0.
_LOOKED_UP = ("sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"')
#: Seconds for the proxy to listen, or for a process to start.
_LISTENS_S = 20.0


class Spread(Cluster):
    """A run whose coordinator and servers are on one host, and workers on both hosts or the other one. They start one by one."""

    def __init__(
        self, folder: Path, processes: Processes, hosts: list[network.Host], servers: int, near: int, far: int, *flags: object
    ):
        """Start the run. `near` workers are on the coordinator's host, `far` ones on the other host."""
        self.hosts, self.processes = hosts, processes
        self._near = near
        bind = ("--listen", f"tcp://{hosts[0].address}:{_PORT}", "--run-dir", folder)
        size = ("--servers", servers, "--workers", near + far)
        prefix = (*_WITH_US, *self._on(0, "coordinator"))
        super().__init__(folder, *bind, *size, *flags, command="coordinator", prefix=prefix)
        self._start_all([f"server-{number}" for number in range(servers)] + [f"worker-{number}" for number in range(near + far)])

    def _start_all(self, names: list[str]) -> None:
        for name in names:
            role, _, number = name.partition("-")
            command = (role, "--coordinator", self._coordinator(), "--index", number, *self._flags(name))
            self.processes.start(name, [*self._on(self._host(name), name), sys.executable, str(LAUNCH), *command])

    def _coordinator(self) -> str:
        """Return the coordinator's address for the other processes."""
        return f"tcp://{self.hosts[0].address}:{_PORT}"

    def _host(self, name: str) -> int:
        """Return the number of the host of a process."""
        role, _, number = name.partition("-")
        return int(role == "worker" and int(number) >= self._near)

    def _flags(self, name: str) -> tuple[str, ...]:
        return ()

    def _on(self, host: int, name: str) -> tuple[str, ...]:
        """Return the words before a command that runs on a host as the process of this name."""
        return (*self.hosts[host].prefix, *_NAMED, f"host{host}")

    def pids(self) -> dict[str, int]:
        return {}  # each process has a process namespace of its own

    def left_behind(self) -> dict[str, int]:
        return {}

    def firewall(self, host: int, *rule: str) -> None:
        _run("ip", "netns", "exec", self.hosts[host].prefix[3], "iptables", *rule)


class Unreached(Spread):
    """A run with a server that no worker of the other host can reach."""

    def _start_all(self, names: list[str]) -> None:
        self.firewall(1, "-A", "OUTPUT", "-p", "tcp", "--dport", str(_FIXED_PORT), "-j", "DROP")
        super()._start_all(names)

    def _flags(self, name: str) -> tuple[str, ...]:
        return ("--listen", f"tcp://*:{_FIXED_PORT}") if name == _FIXED else ()


class Unresolved(Spread):
    """A run in which the host names of the coordinator and of a server are unknown for some time."""

    def _start_all(self, names: list[str]) -> None:
        self._names().write_text("127.0.0.1 localhost\n", encoding="utf-8")
        super()._start_all(names)
        for name in (_HEAD, _STORE):
            time.sleep(_UNKNOWN_S)
            assert not self.rounds(), f"training goes on although {name} is unknown"
            with self._names().open("a", encoding="utf-8") as file:
                file.write(f"{self.hosts[0].address} {name}\n")

    def _names(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}-names")

    def _coordinator(self) -> str:
        return f"tcp://{_HEAD}:{_PORT}"

    def _flags(self, name: str) -> tuple[str, ...]:
        return ("--listen", f"tcp://*:{_FIXED_PORT}", "--advertise", f"{_STORE}:{_FIXED_PORT}") if name == _FIXED else ()

    def _on(self, host: int, name: str) -> tuple[str, ...]:
        lookup = () if name == "coordinator" else (*_LOOKED_UP, str(self._names()))
        return (*super()._on(host, name), *lookup)


class Namesakes(Spread):
    """A run on two hosts with one name.

    A server on the second host has the coordinator's process id. A worker there has the process id of a process on the first
    host that is not part of the run.
    """

    def __init__(
        self, folder: Path, processes: Processes, hosts: list[network.Host], servers: int, near: int, far: int, *flags: object
    ):
        begun = [processes.start(f"host-{n}", [*host.prefix[:4], *_SHARED, "twin"]) for n, host in enumerate(hosts)]
        self._hosts = [_inside(child.popen.pid, "sleep") for child in begun]
        self._ids = {"coordinator": 1000, f"server-{servers - 1}": 1000, "stranger": 2000, f"worker-{near}": 2000}
        processes.start("stranger", [*self._inside(0, 2000), "sleep", "1d"])
        super().__init__(folder, processes, hosts, servers, near, far, *flags)

    def _host(self, name: str) -> int:
        return int(name in self._ids)

    def _on(self, host: int, name: str) -> tuple[str, ...]:
        return self._inside(host, self._ids.get(name, 0))

    def _inside(self, host: int, number: int) -> tuple[str, ...]:
        entered = ("nsenter", "--target", str(self._hosts[host]), "--pid", "--uts", "--net", "--mount")
        return (*entered, "env", "--unset", PARENT_VARIABLE, *((*_NUMBERED, str(number)) if number else ()))

    def pids(self) -> dict[str, int]:
        """Return the ids, as seen from outside of the hosts, of the processes that were given an id there."""
        started = {child.name: child.popen.pid for child in self.processes.children} | {"coordinator": self._popen.pid}
        return {name: _inside(started[name], "sleep" if name == "stranger" else sys.executable) for name in self._ids}


#: Makes a run on two hosts.
Scene = Callable[..., Spread]
#: Does harm to such a run.
Change = Callable[[Spread], None]


@contextlib.contextmanager
def hosts(logs: Path) -> Iterator[tuple[list[network.Host], Processes]]:
    """Yield two hosts, and a set of processes to start on them. At the end no process and no host is left."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with network.hosts("1gbit") as made, Processes(logs, env) as processes:
        yield made, processes


def cut(seconds: float, both_ways: bool, heals: bool = True) -> Change:
    """Return a change that drops all packets from worker-2, alone on its host, to server-1.

    `both_ways`: packets in the other direction are dropped too. After `seconds` the link is whole again, if it `heals`.
    """

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
    """Drop all packets from worker-2, alone on its host, to server-1 for ever. The run must go on without worker-2."""
    cut(0.0, both_ways=False, heals=False)(run)
    run.until(lambda: any(event.process == "worker-2" for event in run.events("lost")), "giving up of worker-2")


def stop_namesakes(run: Spread) -> None:
    """Stop the server and the worker of `Namesakes` until both count as lost, and wake them."""
    pids = run.pids()
    ids = {name: Path(f"/proc/{pid}/status").read_text(encoding="ascii").partition("NSpid:")[2].split("\n")[0].split()[-1]
           for name, pid in pids.items()}  # fmt: skip
    far = [name for name in pids if name.startswith(("server", "worker"))]
    assert sorted(ids[name] for name in far) == sorted(ids[name] for name in pids if name not in far), f"the ids are {ids}"
    for name in far:
        run.signal(name, signal.SIGSTOP)
    time.sleep(_STOPPED_S)
    for name in far:
        run.signal(name, signal.SIGCONT)
    run.until(lambda: {event.process for event in run.events("lost")} >= set(far), f"loss of {' and '.join(far)}")
    there = psutil.Process(pids["stranger"])
    assert there.is_running() and there.status() == psutil.STATUS_SLEEPING, "a stranger was harmed"


def cannot_reach(run: Spread) -> None:
    """Wait until the run says which address worker-2 cannot reach from its host."""
    told = f"worker-2 on host1 cannot reach {_FIXED} on host0 at tcp://{run.hosts[0].address}:{_FIXED_PORT}"
    run.until(lambda: any(told in event.data["text"] for event in run.events("warning")), f"word that {told}")


def delay(made: list[network.Host], processes: Processes, seconds: float) -> None:
    """Delay all traffic between the hosts by `seconds`, in each direction. Called before a run is started."""
    prefix = made[0].prefix
    listens = ("-m", "benchmarks.faults.proxy", str(_PROXY_PORT), str(seconds))
    proxy = processes.start("proxy", [*prefix, sys.executable, *listens], PYTHONPATH=str(LAUNCH.parent))
    inside = ("ip", "netns", "exec", prefix[3])
    deadline = time.monotonic() + _LISTENS_S
    while f":{_PROXY_PORT} " not in subprocess.run([*inside, "ss", "-ltn"], capture_output=True, text=True, check=False).stdout:
        if time.monotonic() > deadline:
            raise UsageError(f"the proxy does not listen after {_LISTENS_S:.0f} s; its log is {proxy.log}.")
        time.sleep(0.1)
    redirect = ("-j", "REDIRECT", "--to-ports", str(_PROXY_PORT))
    _run(*inside, "iptables", "-t", "nat", "-A", "PREROUTING", "-i", made[0].interface, "-p", "tcp", *redirect)


def _inside(pid: int, program: str) -> int:
    """Return the id of the process that runs `program` below `pid`, once it has started. Raises UsageError if it does not."""
    deadline = time.monotonic() + _LISTENS_S
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.Error, IndexError):
            for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
                if process.cmdline()[0] == program:
                    return int(process.pid)
        time.sleep(0.05)
    raise UsageError(f"{program} was not started on a host of its own; nsenter and unshare are needed for that.")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"'{' '.join(command)}' failed: {done.stderr.strip()}")
