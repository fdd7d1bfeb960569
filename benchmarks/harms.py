"""Harms that can be done to a run on this machine. Each takes a running run, and returns the run to look at afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.attacks import Deed, Item, Memory, attacking, joining, targets
from benchmarks.live import LAUNCH, ByHand, Cluster
from benchmarks.wiretap import Wire, replay
from roundtable.cluster.launch.scale import scale
from roundtable.cluster.process.children import Processes
from roundtable.common.runtime.errors import UsageError
from roundtable.common.runtime.failpoints import MARK
from roundtable.common.storage import checkpoint
from roundtable.common.storage.event_log import RunLogReader
from roundtable.common.storage.run_files import SETTINGS_FILE

Harm = Callable[[Cluster], Cluster]

#: Seconds after which a harm that goes on for as long as the run does is over anyhow.
_LIMIT_S = 90.0
#: Seconds for which a slow process runs at a time: less than a micro-batch takes, or it would seem as fast as others.
_SLICE_S = 0.001
#: Seconds between two kills, between that and that many: of random kills for so long at most, and for longer.
_KILLS_S, _FEWER_KILLS_S = (0.5, 2.0), (2.0, 10.0)
_SHORT_S = 60.0
#: How many times slower workers are then, and seconds after which it is asked anew which train; how many times slower they
#: are where others join in every round, and seconds between two looks at it.
_SLOWED, _LONGEST_S, _CRAWLS = 20, 0.5, 200
_LOOK_S = 0.1
#: Seconds for which there is an attack, and before it for which messages are overheard.
ATTACK_S, _TAPPED_S = 4.0, 1.0
#: Seconds between two times that what was overheard is said.
_AGAIN_S = 0.2
#: Bytes by which a process may grow under an attack.
MOST_GROWN = 200 << 20
_CLONE_NEWNS = 0x00020000
_DISK_BYTES = 48 << 20
#: Has time.time() be an hour off, in a process that imports it, once there is a certain file.
_CLOCK = """import os, time
real = time.time
time.time = lambda: real() + ({seconds} if os.path.exists({flag!r}) else 0)
"""
#: Has what waits for the disk take so much longer, once there is a certain file.
_SLOW_DISK = """#include <sys/syscall.h>
#include <unistd.h>
static void wait(void) {{ if (access("{flag}", F_OK) == 0) usleep({microseconds}); }}
int fsync(int fd) {{ wait(); return syscall(SYS_fsync, fd); }}
int fdatasync(int fd) {{ wait(); return syscall(SYS_fdatasync, fd); }}
"""


def nothing(run: Cluster) -> Cluster:
    return run


def kill_with_model(*names: str) -> Harm:
    """Kill with -9 once the trained model is written."""

    def harm(run: Cluster) -> Cluster:
        run.until(lambda: run.events("model"), "the model was written")
        for name in names:
            run.signal(name)
        return run

    return harm


def failpoints(count: int) -> Harm:
    """Wait until so many processes have failed at their failpoints."""

    def harm(run: Cluster) -> Cluster:
        run.until(lambda: len(list(run.folder.glob(f"{MARK}*"))) >= count, f"{count} failpoints were reached")
        return run

    return harm


def failpoint_then_wake(seconds: float, name: str) -> Harm:
    """Wait until a process has stopped at its failpoint, and wake it after so long."""

    def harm(run: Cluster) -> Cluster:
        pid = run.pids()[name]
        failpoints(1)(run)
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        return run

    return harm


def kill(*names: str) -> Harm:
    """Kill these processes with -9, all at once."""

    def harm(run: Cluster) -> Cluster:
        for name in names:
            run.signal(name)
        return run

    return harm


def stop(name: str, seconds: float) -> Harm:
    """Stop processes with SIGSTOP, and wake them with SIGCONT after some seconds."""

    def harm(run: Cluster) -> Cluster:
        pid = run.pids()[name]
        run.signal(name, signal.SIGSTOP)
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        return run

    return harm


def slow(name: str, factor: int) -> Harm:
    """Let a process run for 1/factor of the time only, until the run ends."""

    def harm(run: Cluster) -> Cluster:
        _slow_down(run, [run.pids()[name]], factor, _LIMIT_S)
        return run

    return harm


def _slow_down(run: Cluster, pids: Sequence[int], factor: int, seconds: float) -> None:
    """Have these processes run for a 1/factor of so many seconds only, or of those until the run ends."""

    def tell(number: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    end = time.monotonic() + seconds
    try:
        while run.is_running and time.monotonic() < end:
            tell(signal.SIGSTOP)
            time.sleep(_SLICE_S * (factor - 1))
            tell(signal.SIGCONT)
            time.sleep(_SLICE_S)
    finally:
        tell(signal.SIGCONT)


def power_loss(damaged: bool, *flags: object) -> Harm:
    """All are killed at once, and the run goes on by `--resume` with `flags`; if `damaged`, a bit of its newest snapshot is
    changed before."""

    def harm(run: Cluster) -> Cluster:
        run.until(lambda: len(run.events("snapshot")) > 1, "second snapshot")
        run.cut_power()
        if damaged:
            whole = checkpoint.finished(run.folder)
            file = whole[-1] / checkpoint.file_of(0)
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        return Cluster(run.folder, "--resume", run.folder, *flags)

    return harm


def launcher_killed(run: Cluster) -> Cluster:
    """The launcher alone is killed; all that it has started must end by itself, and the run goes on by `--resume`."""
    run.kill_launcher()
    return Cluster(run.folder, "--resume", run.folder)


def tell(*names: str) -> Harm:
    """SIGTERM to these processes at once."""

    def harm(run: Cluster) -> Cluster:
        pids = [run.pids()[name] for name in names]
        run.harmed_at = time.time()
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        return run

    return harm


def told_to_stop(*names: str) -> Harm:
    """SIGTERM to these processes, or to the launcher if there are none; the run must end with a snapshot, and goes on by
    `--resume auto`."""

    def harm(run: Cluster) -> Cluster:
        if names:
            tell(*names)(run)
        else:
            run.stop()
        code, out = run.end()
        assert code == 128 + signal.SIGTERM, f"exit code {code}"
        assert "with a checkpoint of round" in out and "; resume the run in" in out, out.strip().splitlines()[-1]
        return Cluster(run.folder, "--resume", "auto", "--config", run.folder / SETTINGS_FILE, "--run-dir", run.folder)

    return harm


def fails(last: str) -> Harm:
    """Wait until the run has failed, with this expression in its last line."""

    def harm(run: Cluster) -> Cluster:
        code, out = run.end()
        found = out.strip().splitlines()[-1:]
        assert code and re.search(last, "".join(found)), f"it ended with exit code {code} and {found}"
        return run

    return harm


# ---- the wire


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
    """What processes say is written down, `then` has something happen, and after that a stranger says all of it again and again:
    to whom it was said, or if `to_all` to whoever listens by then."""

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


def all_begin_anew(run: Cluster) -> None:
    run.signal("server-1")
    run.until(lambda: run.events("restarted"), "new beginning")
    taken = len(run.events("snapshot"))
    run.until(lambda: len(run.events("snapshot")) > taken, "snapshot after the new beginning")


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
    """All connections that processes have with each other are reset, each second for some seconds. Raises UsageError where that
    cannot be."""
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
    """Connections with these ports at this end, as `ss` shows both of their ends."""
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


# ---- processes that come, or come and go


def join(count: int, every_s: float) -> Harm:
    """Start so many workers by hand, one after another. They stay until the run ends."""

    def harm(run: Cluster) -> Cluster:
        with _joining(run, count) as start:
            for number in range(count):
                if run.is_running:
                    start(number)
                    time.sleep(every_s)
        return run

    return harm


def scale_to(workers: int) -> Harm:
    """Scale the launcher to so many workers, and wait for a failpoint."""

    def harm(run: Cluster) -> Cluster:
        scale(str(run.folder), workers)
        return failpoints(1)(run)

    return harm


def join_every_round(count: int) -> Harm:
    """So many workers are made ready, and one joins in every round; until they have, the others are so slow that rounds are told
    of one by one."""

    def harm(run: Cluster) -> Cluster:
        slow = _training(run)

        def crawl_until(ready: Callable[[], bool], what: str) -> None:
            deadline = time.monotonic() + _LIMIT_S
            while not ready():
                assert run.is_running, f"the run ended before {what}"
                assert time.monotonic() < deadline, f"no {what} after {_LIMIT_S:.0f} s"
                _slow_down(run, slow, _CRAWLS, _LOOK_S)

        with _joining(run, count) as start:
            for number in range(count):
                start(number, Path(__file__).with_name("join_when_told.py"), "--", run.folder, number)
            crawl_until(lambda: len(list(run.folder.glob("ready-*"))) == count, "all workers were ready")
            for number in range(count):
                reached = run.rounds()
                crawl_until(lambda reached=reached: run.rounds() > reached, "another round")  # type: ignore[misc]
                (run.folder / f"go-{number}").touch()
        return run

    return harm


@contextlib.contextmanager
def _joining(run: Cluster, count: int) -> Iterator[Callable[..., object]]:
    """What starts a worker by hand, given its number and what it is to run, if not the built-in example. They stay until the run
    ends. Raises AssertionError unless so many have joined by then."""
    address = (run.folder / "address").read_text().strip()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    before, command = _workers(run), [sys.executable, LAUNCH, "worker", "--coordinator", address]
    with Processes(run.folder / "by-hand", env) as processes:
        yield lambda number, *script: processes.start(f"joiner-{number}", list(map(str, [*command, *script])))
        end = time.monotonic() + _LIMIT_S
        while run.is_running and time.monotonic() < end:
            time.sleep(0.1)
    joined = len(_workers(run) - before)
    assert joined == count, f"{joined} of {count} workers joined"


def _training(run: Cluster) -> list[int]:
    """Workers that have joined since all began, or began anew: those that are about to are no part of training yet."""
    pids: dict[str, int] = {}
    for _, _, event in run.read(RunLogReader.events) or []:
        if event.kind == "started":
            pids.clear()
        elif event.kind == "joined" and event.process.startswith("worker"):
            pids[event.process] = int(event.data["pid"])
    return [pid for name, pid in run.pids().items() if pids.get(name) == pid]


def _workers(run: Cluster) -> set[str]:
    return {event.process for event in run.events("joined") if event.process.startswith("worker")}


def churn(seconds: float) -> Harm:
    """Every second or so some worker, server or the coordinator is killed, or where that goes on for minutes, every few seconds,
    and workers are slow, so that the run lasts; each only so often as the launcher starts it again."""

    def harm(run: Cluster) -> Cluster:
        chance, end = random.Random(0), time.monotonic() + seconds
        while time.monotonic() < end:
            if seconds <= _SHORT_S:
                time.sleep(chance.uniform(*_KILLS_S))
            else:
                until = time.monotonic() + chance.uniform(*_FEWER_KILLS_S)
                while run.is_running and (left := until - time.monotonic()) > 0:
                    _slow_down(run, _training(run), _SLOWED, min(left, _LONGEST_S))
            if not run.is_running:
                code, out = run.end()
                last = out.strip().splitlines()[-1:]
                raise AssertionError(f"the run ended {end - time.monotonic():.0f} s early with exit code {code}: {last}")
            if pids := run.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pids[chance.choice(sorted(pids))], signal.SIGKILL)
        return run

    return harm


# ---- the disk


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A small file system of its own in `folder`. It is mounted where only this process and its children see it, so that nothing
    is left of it however they end. Raises UsageError where that cannot be."""
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() or libc.unshare(_CLONE_NEWNS):
        raise UsageError("mounts a file system, for which it must be run as root")
    folder.mkdir()
    for command in (
        ["mount", "--make-rprivate", "/"],
        ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(folder)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UsageError(f"'{' '.join(command)}' failed: {done.stderr.strip()}")
    try:
        yield folder / "run"
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def fill(seconds: float) -> Harm:
    """Fill the file system of the run directory's parent for some seconds."""

    def harm(run: Cluster) -> Cluster:
        file = run.folder.parent / "full"
        end = time.monotonic() + seconds
        with file.open("wb", buffering=0) as out:
            while time.monotonic() < end:
                try:
                    out.write(bytes(64 << 10))
                except OSError:
                    time.sleep(0.02)  # and take what is given back meanwhile
        assert "warning: " in (shown := run.shown()), f"nobody who looks on was told of the full disk: {shown}"
        file.unlink()
        return run

    return harm


def read_only(seconds: float) -> Harm:
    """The run directory can be read only for so long: what is open stays so, and nothing new can be made in it. Of a run on
    `small_disk`."""

    def harm(run: Cluster) -> Cluster:
        place, began, rounds, taken = str(run.folder), time.time(), run.rounds(), len(run.events("snapshot"))
        for command in (["mount", "--bind", place, place], ["mount", "-o", "remount,bind,ro", place]):
            subprocess.run(command, check=True, capture_output=True)
        time.sleep(seconds)
        assert run.rounds() > rounds, "training did not go on while the folder could not be written"
        told = [event for _, at, event in run.read(RunLogReader.events) if event.kind == "warning" and at > began]
        assert any("no snapshot" in event.data["text"] for event in told), "nobody has told that there is no snapshot"
        assert "warning: no snapshot" in run.shown(), "nobody who looks on was told that there is no snapshot"
        subprocess.run(["umount", "--lazy", place], check=True, capture_output=True)
        run.until(lambda: len(run.events("snapshot")) > taken + 1, "snapshots again")
        return run

    return harm


def slow_disk(folder: Path, wait_s: float, seconds: float) -> tuple[Harm, dict[str, str]]:
    """For so many `seconds` all that waits for the disk waits `wait_s` longer; and the environment, with a library in `folder`,
    in which it can."""
    folder.mkdir(parents=True)
    flag, library, source = folder / "slow", folder / "slow.so", folder / "slow.c"
    source.write_text(_SLOW_DISK.format(flag=flag, microseconds=round(wait_s * 1e6)), encoding="utf-8")
    if shutil.which("gcc") is not None:
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)

    def harm(run: Cluster) -> Cluster:
        assert library.exists(), "there is no gcc to make the disk slow with"
        rounds, taken = run.rounds(), len(run.events("snapshot"))
        flag.touch()
        time.sleep(seconds)
        assert run.rounds() > rounds, "training did not go on while the disk was slow"
        flag.unlink()
        run.until(lambda: len(run.events("snapshot")) > taken + 1, "snapshots again")
        return run

    return harm, {"LD_PRELOAD": str(library)}


# ---- the coordinator, and the clock


def coordinator_killed(run: Cluster) -> Cluster:
    """Kill the coordinator with -9. If it was started by hand, start another one."""
    run.signal("coordinator")
    if isinstance(run, ByHand):
        run.recover()
    return run


def clock(folder: Path, seconds: float) -> tuple[Harm, dict[str, str]]:
    """The wall clock of all processes moves; and the environment, with a module in `folder`, in which it can."""
    folder.mkdir(parents=True)
    flag = folder / "moved"
    (folder / "sitecustomize.py").write_text(_CLOCK.format(seconds=seconds, flag=str(flag)), encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))

    def harm(run: Cluster) -> Cluster:
        flag.touch()
        time.sleep(1.0)
        return coordinator_killed(run)  # the new coordinator reads times of the other clock

    return harm, {"PYTHONPATH": path}
