"""A launcher that was started, and what is left of it."""

from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

#: Seconds in which everything has to be gone after a signal or a failure: the promise.
STOP_S = 5.0
#: Seconds for anything to start, on a machine that others use too.
START_S = 60.0
MARK = "TEST_MARK"


class Launched:
    """A process of a session of its own, and everything that it starts, known by a mark in the environment."""

    def __init__(self, argv: Sequence[object], folder: Path, env: Mapping[str, str]) -> None:
        self._mark = secrets.token_hex(8)
        self._fifo = folder / f"ready-{self._mark}"
        os.mkfifo(self._fifo)
        self._ready = os.open(self._fifo, os.O_RDWR)
        self._lines = b""
        self.memory_before = shared_memory()
        self.popen = subprocess.Popen(
            list(map(str, argv)),
            cwd=folder,
            env={**os.environ, **env, MARK: self._mark, "STUB_READY": str(self._fifo)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def ready(self, count: int) -> dict[str, int]:
        """Wait until `count` lines, '<name> <pid>', have come from those inside."""
        deadline = time.monotonic() + START_S
        while self._lines.count(b"\n") < count:
            readable, _, _ = select.select([self._ready], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, f"only {self._lines!r} after {START_S} s"
            self._lines += os.read(self._ready, 4096)
        return {name: int(pid) for name, pid in (line.split() for line in self._lines.decode().splitlines())}

    def members(self) -> set[int]:
        """All living processes that carry the mark."""
        found = set()
        for path in Path("/proc").iterdir():
            try:
                if path.name.isdigit() and f"{MARK}={self._mark}".encode() in (path / "environ").read_bytes():
                    found.add(int(path.name))
            except OSError:
                continue
        return found

    def end(self, timeout: float = STOP_S) -> tuple[int, list[str]]:
        """Wait for the launcher to end; its exit code, and the lines it has shown."""
        try:
            out, _ = self.popen.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it still runs after {timeout} s") from None
        return self.popen.returncode, out.splitlines()

    def leaves_nothing(self, pids: set[int]) -> None:
        """Assert that no process is left, now that the launcher has ended, nor shared memory of any of `pids`."""
        assert self.members() == set()
        made = shared_memory() - self.memory_before
        assert [name for name in made if name.startswith("torch_") and int(name.split("_")[1]) in pids] == []

    def close(self) -> None:
        for pid in self.members():
            os.kill(pid, signal.SIGKILL)
        self.popen.communicate()
        os.close(self._ready)


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def wait_for_ends(pids: set[int], timeout: float = STOP_S) -> None:
    """Wait for processes to end that are not our children."""
    handles = []
    for pid in pids:
        try:
            handles.append(os.pidfd_open(pid))
        except ProcessLookupError:
            continue
    poller = select.poll()
    for handle in handles:
        poller.register(handle, select.POLLIN)
    left, deadline = set(handles), time.monotonic() + timeout
    while left:
        ended = poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
        assert ended, f"{len(left)} processes still run after {timeout} s"
        for handle, _ in ended:
            poller.unregister(handle)
            left.discard(handle)
    for handle in handles:
        os.close(handle)
