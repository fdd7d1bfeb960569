"""Harms by what comes over the network: attacks, messages that come twice, and broken connections."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator

from benchmarks.attacks.deeds import Deed, joining
from benchmarks.attacks.memory import Memory
from benchmarks.attacks.strangers import Item, attacking
from benchmarks.attacks.target import targets
from benchmarks.attacks.wiretap import Wire, replay
from benchmarks.faults.harms.base import Harm
from benchmarks.live import Cluster
from roundtable.common.runtime.errors import UsageError

#: Seconds for which there is an attack.
ATTACK_S = 4.0
#: Seconds before an attack for which messages are overheard.
_TAPPED_S = 1.0
#: Seconds until what was overheard is sent once more.
_AGAIN_S = 0.2
#: Bytes by which a process may grow under an attack.
MOST_GROWN = 200 << 20


def strangers(item: Item) -> Harm:
    """Attack the coordinator and all servers as strangers, for some seconds. No process may end or grow by it."""

    def harm(run: Cluster) -> Cluster:
        with _withstanding(run), attacking([item], targets(run)):
            _wait(run, ATTACK_S)
        return run

    return harm


def joined(deed: Deed) -> Harm:
    """Join as a worker, and attack for some seconds. No process may end or grow by it."""

    def harm(run: Cluster) -> Cluster:
        with _withstanding(run), joining(deed, targets(run)[0]):
            _wait(run, ATTACK_S)
        return run

    return harm


def overheard(wire: Wire, then: Callable[[Cluster], object] = lambda run: None, to_all: bool = False) -> Harm:
    """Write down what processes send, let `then` do something, and send all of it again and again as a stranger.

    It goes to the processes that it went to before, or if `to_all` to all processes that listen by then.
    """

    def harm(run: Cluster) -> Cluster:
        wire.on()
        _wait(run, _TAPPED_S)
        wire.off()
        messages = wire.heard()
        assert messages, "nothing was overheard"
        then(run)
        where, end = targets(run) if to_all else (), time.monotonic() + ATTACK_S
        with _withstanding(run):
            while time.monotonic() < end:
                replay(messages, where)
                _wait(run, _AGAIN_S)
        return run

    return harm


def a_worker_is_lost(run: Cluster) -> None:
    run.signal("worker-1")
    run.until(lambda: any(event.process == "worker-1" for event in run.events("lost")), "loss of worker-1")


def all_restart(run: Cluster) -> None:
    run.signal("server-1")
    run.until(lambda: run.events("restarted"), "new beginning")
    taken = len(run.events("checkpoint"))
    run.until(lambda: len(run.events("checkpoint")) > taken, "checkpoint after the new beginning")


def unruly(wire: Wire) -> Harm:
    """Send the messages of all processes twice, or after later ones, for some seconds."""

    def harm(run: Cluster) -> Cluster:
        with _withstanding(run):
            wire.on()
            _wait(run, ATTACK_S)
            wire.off()
        assert wire.was_unruly, "no message went twice or late"
        return run

    return harm


def broken_connections(run: Cluster) -> Cluster:
    """Reset all connections between the run's processes, each second for some seconds.

    Raises UsageError if this machine does not allow it.
    """
    ports = " or ".join(f"sport = :{target.port}" for target in targets(run))
    reset: set[str] = set()
    with _withstanding(run):
        for _ in range(round(ATTACK_S)):
            before = _connections(ports)
            reset |= before
            _connections(ports, "--kill")
            if before & _connections(ports):
                raise UsageError("'ss --kill' leaves connections be; it must be run as root, on a kernel with INET_DIAG_DESTROY")
            _wait(run, 1.0)
    assert reset, "there was no connection to reset"
    return run


def _connections(ports: str, *flags: str) -> set[str]:
    """Return the connections with these ports at this end, as `ss` shows both of their ends."""
    command = ["ss", "--tcp", "--numeric", "--no-header", *flags, "state", "established", f"( {ports} )"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return {" ".join(line.split()[-2:]) for line in shown.splitlines()}


@contextlib.contextmanager
def _withstanding(run: Cluster) -> Iterator[None]:
    """Check that no process of the run ends or grows much meanwhile."""
    before, memory = run.pids(), Memory(run)
    yield
    now, grown = run.pids(), memory.grown()
    ended = sorted(name for name, pid in before.items() if now.get(name) != pid)
    assert not ended, f"{' and '.join(ended)} did not survive it"
    assert grown <= MOST_GROWN, f"a process came to have {grown >> 20} MB more, where {MOST_GROWN >> 20} are allowed"


def _wait(run: Cluster, seconds: float) -> None:
    time.sleep(seconds)
    if not run.is_running:
        code, out = run.end()
        raise AssertionError(f"the run ended with exit code {code} before that was over: {out.strip().splitlines()[-1:]}")
