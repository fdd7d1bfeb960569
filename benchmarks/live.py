"""A real run whose processes can be killed at a chosen moment."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]

from benchmarks import LAUNCH
from roundtable.cluster.process.children import Processes
from roundtable.cluster.process.parent_death import PARENT_VARIABLE
from roundtable.common.storage.event_log import FILE_NAME, Event, RunLogReader
from roundtable.common.storage.run_files import SUMMARY_FILE

#: A small network on real digits, for so many rounds that there is time to do harm.
LENGTH = ("--epochs", 24, "--checkpoint-every", 0.4)
TRAINING = ("--data", "digits", "--model", "mlp", *LENGTH)
#: The address at which a coordinator that is started by hand listens.
LOOPBACK = "tcp://127.0.0.1:0"
#: Seconds for anything to happen, on a machine that others use too.
_PATIENCE_S = 90.0
#: Seconds between two looks at whether rounds go on.
_LOOK_S = 5.0
#: Seconds for everything to end after the launcher.
_ENDS_S = 5.0


class Cluster:
    """A `launch.py local` that runs while a test watches, or the coordinator of other processes."""

    #: The unix seconds at which the first of its processes was harmed.
    harmed_at: float | None = None

    def __init__(
        self,
        folder: Path,
        *flags: object,
        env: Mapping[str, str] | None = None,
        command: str = "local",
        prefix: Sequence[str] = (),
    ) -> None:
        """`env` is added to the environment, and `prefix` stands before the command line."""
        self.folder = folder
        self._popen = subprocess.Popen(
            [*prefix, sys.executable, str(LAUNCH), command, *map(str, flags)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder.parent, start_new_session=True,
            env={**os.environ, **(env or {}), PARENT_VARIABLE: str(os.getpid())},
        )  # fmt: skip

    def read(self, what: Callable[[RunLogReader], Any]) -> Any:
        """Return what `what` finds in the event log, or None while there is no log."""
        try:
            with contextlib.closing(RunLogReader(self.folder / FILE_NAME)) as log:
                return what(log)
        except sqlite3.Error:
            return None

    def events(self, kind: str) -> list[Event]:
        return [event for _, _, event in self.read(RunLogReader.events) or [] if event.kind == kind]

    def rounds(self) -> int:
        return len(self.read(RunLogReader.rounds) or [])

    def until(self, ready: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not ready():
            assert self._popen.poll() is None, f"the run ended before {what}:\n{self._popen.communicate()[0]}"
            assert time.monotonic() < deadline, f"no {what} after {_PATIENCE_S:.0f} s: {self.state()}"
            time.sleep(0.02)

    def shown(self) -> str:
        """Return the new output. `end` does not return it again."""
        assert self._popen.stdout is not None
        handle, found = self._popen.stdout.fileno(), b""
        while select.select([handle], [], [], 0)[0] and (part := os.read(handle, 1 << 16)):
            found += part
        return found.decode("utf-8", "replace")

    @property
    def is_running(self) -> bool:
        return self._popen.poll() is None

    def pids(self) -> dict[str, int]:
        """Return the newest living process of each name."""
        return {name: pid for name, pid in dict(self._reported()).items() if _is_ours(pid)}

    def left_behind(self) -> dict[str, int]:
        """Return all processes of the run that still exist."""
        return {name: pid for name, pid in self._reported() if _is_ours(pid)}

    def _reported(self) -> list[tuple[str, int]]:
        """Return the name and id of each process that the run has had, oldest first."""
        events = [event for _, _, event in self.read(RunLogReader.events) or []]
        return [(e.process, int(e.data["pid"])) for e in events if e.kind in ("started", "recovered", "joined")]

    def state(self) -> str:
        """Return what each process does and which process it waits for, by the event log."""
        rows = self.read(RunLogReader.statuses) or []
        waits = {row.process: f" for {row.waits_for}" if row.waits_for else "" for row in rows}
        return (
            ", ".join(f"{row.process} {row.state}{waits[row.process]} in round {row.round}" for row in rows) or "nobody is there"
        )

    def signal(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to the process called `name`."""
        pid = self.pids()[name]
        self.harmed_at = self.harmed_at or time.time()
        os.kill(pid, number)

    def end(self) -> tuple[int, str]:
        """Wait for the end as long as new rounds are done. Return the exit code and the output."""
        most, moved_at = -1, time.monotonic()
        while True:
            try:
                out, _ = self._popen.communicate(timeout=_LOOK_S)
                return self._popen.returncode, out
            except subprocess.TimeoutExpired:
                rounds, now = self.rounds(), time.monotonic()
            if rounds > most:
                most, moved_at = rounds, now
            if now > moved_at + _PATIENCE_S:
                state = self.state()
                self.cut_power()
                raise AssertionError(f"the run goes on with no new round for {_PATIENCE_S:.0f} s: {state}")

    def summary(self) -> dict[str, Any]:
        """Wait for an end without failure, and return the summary."""
        code, out = self.end()
        logs = "".join(f"\n--- {log.name}\n{log.read_text()[-1500:]}" for log in (self.folder / "logs").glob("*"))
        assert code == 0, f"exit code {code}: {out.strip().splitlines()[-1] if out.strip() else 'no word'}\n{out}{logs}"
        return dict(json.loads((self.folder / SUMMARY_FILE).read_text()))

    def is_exact(self) -> bool:
        """Return True if, by the ledger, every micro-batch of each committed round is dropped or in exactly one committed
        contribution."""
        planned = Counter({row.round: row.micro_batches for row in self.read(RunLogReader.rounds) or []})
        committed = [c for c in self.read(RunLogReader.contributions) or [] if c.outcome == "committed" and c.round in planned]
        counted = Counter((row.round, k) for row in committed for k in range(row.lo, row.hi))
        return set(counted.values()) == {1} and Counter(round_ for round_, _ in counted) == planned

    def cut_power(self) -> None:
        """Kill everything at once."""
        self.harmed_at = self.harmed_at or time.time()
        os.kill(self._popen.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        for pid in self.left_behind().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._popen.communicate()

    def kill_launcher(self) -> None:
        """Kill the launcher alone. Raise AssertionError if a process that it has started goes on."""
        started = psutil.Process(self._popen.pid).children(recursive=True)
        self.harmed_at = self.harmed_at or time.time()
        self._popen.kill()
        self._popen.wait()
        deadline = time.monotonic() + _ENDS_S
        while left := [process.pid for process in started if _goes_on(process)]:
            assert time.monotonic() < deadline, f"left behind {_ENDS_S:.0f} s after the launcher was killed: {left}"
            time.sleep(0.05)
        self._popen.communicate()

    def stop(self) -> None:
        """Tell the launcher to stop."""
        self.harmed_at = self.harmed_at or time.time()
        self._popen.send_signal(signal.SIGTERM)

    def close(self) -> None:
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGTERM)
            try:
                self._popen.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                self.cut_power()


class ByHand(Cluster):
    """A coordinator, servers and workers on this machine that were started one by one, without a launcher to restart them."""

    def __init__(
        self,
        folder: Path,
        processes: Processes,
        servers: int,
        workers: int,
        *flags: object,
        env: Mapping[str, str] | None = None,
        bind: str = LOOPBACK,
    ):
        """Start all processes. `env` is added to the coordinator's environment. `processes` gives the others theirs."""
        self._processes = processes
        self._env = env
        self._flags = ("--listen", bind, "--run-dir", folder, "--servers", servers, "--workers", workers, *flags)
        super().__init__(folder, *self._flags, env=env, command="coordinator")
        self.until((folder / "address").exists, "listening")
        address = (folder / "address").read_text().strip()
        for name in [f"server-{n}" for n in range(servers)] + [f"worker-{n}" for n in range(workers)]:
            kind, _, number = name.partition("-")
            processes.start(name, [sys.executable, str(LAUNCH), kind, "--coordinator", address, "--index", number])

    def recover(self) -> None:
        """Start another coordinator in place of the one that was killed."""
        self._popen.communicate()
        super().__init__(self.folder, *self._flags, "--recover", env=self._env, command="coordinator")

    def end(self) -> tuple[int, str]:
        code, out = super().end()
        for child in self._processes.children:
            try:
                child.popen.wait(timeout=_PATIENCE_S)
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{child.name} goes on {_PATIENCE_S:.0f} s after the run's end") from None
        return code, out


def _is_ours(pid: int) -> bool:
    """Return whether a process of a run has this id and lives. Another program may have got the id."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"launch.py" in command or b"cli.py" in command  # the launcher runs one of these files
    except OSError:
        return False


def _goes_on(process: psutil.Process) -> bool:
    """Return whether the process runs. A zombie has ended."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
