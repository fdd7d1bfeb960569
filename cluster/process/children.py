"""Child processes that are watched together and leave nothing behind.

Each child has its own session, hence process group, and its own log file. A child may start processes in turn, such as
processes that load data. They are known by that group and by an environment variable, and are stopped too, even after the child
has died. If this process is killed, the kernel ends the children (`roundtable.cluster.process.parent_death`), and a guard ends
all their descendants (`roundtable.cluster.process.orphan_reaper`).
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from roundtable.cluster.process import orphan_reaper
from roundtable.cluster.process.fork_server import Forked, ForkServer
from roundtable.cluster.process.parent_death import PARENT_VARIABLE
from roundtable.common.runtime.restart import AGAIN
from roundtable.common.storage import private_files

#: Seconds that a child has to end by itself after SIGTERM, before SIGKILL.
TERM_S = 1.5
#: Seconds for killed processes to be gone after SIGKILL.
_KILL_S = 1.0
#: Seconds in which, after one process has failed, the others may say why they did.
GATHER_S = 2.0
#: How often waiting loops look.
TICK_S = 0.05

#: Exit codes of processes that a signal has told to stop.
_STOP_CODES = (128 + signal.SIGINT, 128 + signal.SIGTERM)
_TAIL_BYTES = 16 << 10
_ERROR_LINE = re.compile(r"^(?:\S+: )?error: (.+)$")
_OTHERS_FAILURE = re.compile(r"^((?:worker|server)-\d+)(?: on \S+)? failed: ")
_WAS_STOPPED = re.compile(r"\b(?:stopped because|told to stop)\b")


@dataclass
class Child:
    """A process that was started. `code` is None while it runs, else its exit code, or minus the signal that killed it."""

    name: str
    log: Path
    popen: subprocess.Popen[bytes] | Forked
    code: int | None = None
    #: When the end was noticed, on the clock of time.monotonic.
    ended_at: float = 0.0
    #: Whether the run goes on although the child has failed.
    excused: bool = False
    #: Whether the child was told to leave the run.
    leaves: bool = False
    #: How often the child was restarted.
    restarts: int = 0
    #: When the child is to be restarted, on the same clock. None if it is not.
    due_at: float | None = None
    #: Whether no process of its process group is left.
    gone: bool = field(default=False, repr=False)
    command: Sequence[str] = field(default=(), repr=False)
    #: The command for a restart that the child asks for. If empty, `command`.
    resume_command: Sequence[str] = field(default=(), repr=False)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def failed(self) -> bool:
        return bool(self.code) and not self.excused

    @property
    def was_stopped(self) -> bool:
        """Return whether the child ended because a signal told it to stop."""
        return self.code in _STOP_CODES

    def describe_end(self) -> str:
        """Return one sentence on how and why the child failed, and which log to read."""
        assert self.code is not None
        if self.code > 0 and (other := _OTHERS_FAILURE.match(error_in(self.log) or "")):
            log = self.log.with_name(f"{other[1]}.log")  # has the other's own error, even if that process has not ended yet
            own = error_in(log)
            told = f"{other[1]} failed: {own}" if own else str(other.string)
            return f"{told.rstrip('.')}; its log is {log}."
        return f"{self.name} {self.end()}; its log is {self.log}."

    def end(self) -> str:
        """Return how and why the child failed: 'was killed by ...', 'failed: ...'."""
        assert self.code is not None
        if self.code < 0:
            return f"was killed by signal {-self.code} ({_signal_name(-self.code)})"
        if self.was_stopped:
            return f"was told to stop by {_signal_name(self.code - 128)}"
        reason = error_in(self.log)
        if reason is not None:
            return f"failed: {reason.rstrip('.')}"
        last = last_line(self.log)
        return f"failed with exit code {self.code}" + (f": {last}" if last else " and no output")


class Processes:
    """Children with logs in the folder `log_dir`. A context: at its end it stops all of them."""

    def __init__(self, log_dir: Path, env: Mapping[str, str], term_s: float = TERM_S, files: Sequence[int] = ()) -> None:
        """Make a set without children.

        `env` is the children's environment; `start` adds to it. Children inherit the file descriptors `files`.
        """
        self.children: list[Child] = []
        self._log_dir = log_dir
        self._family = secrets.token_hex(8)
        ours = {PARENT_VARIABLE: str(os.getpid()), orphan_reaper.FAMILY_VARIABLE: self._family}
        self._env = {**env, **ours, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        self._term_s = term_s
        self._files = files
        self._guard: subprocess.Popen[bytes] | None = None
        #: Descendants that ran when `start_no_more` was called.
        self._seen: set[int] = set()
        self._fork_server: ForkServer | None = None
        self._stops = False

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def prepare(self, modules: Sequence[str], **env: str) -> ForkServer:
        """Return a fork server that imports `modules`. Once it is ready, it makes the children.

        `env` is added to its environment. Raises OSError if it cannot be started.
        """
        self._fork_server = ForkServer(modules, {**self._env, **env})
        return self._fork_server

    def start(self, name: str, argv: Sequence[str], **env: str) -> Child:
        """Start a child and return it. Its output goes to `<name>.log`. Raises OSError if the child cannot be started."""
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._guard = self._guard or _start_guard(self._family)
        log = self._log_dir / f"{name}.log"
        log.unlink(missing_ok=True)
        child = Child(name, log, self._spawn(argv, env, log), command=argv, env=env)
        self.children.append(child)
        return child

    def again(self, child: Child) -> None:
        """Restart a child that has ended, with its `command`. Append to its log, and kill the processes that it started.

        Raises OSError if the child cannot be started.
        """
        old = child.popen.pid
        for pid in orphan_reaper.relatives({old}, ""):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        orphan_reaper.remove_shared_memory({old})
        child.popen = self._spawn(child.command, child.env, child.log)
        child.code, child.ended_at, child.excused, child.due_at, child.gone = None, 0.0, False, None, False

    def _spawn(self, argv: Sequence[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes] | Forked:
        env = {**self._env, **env}
        log.open("ab").close()  # raises OSError here, if at all
        forked = self._fork_server.start(argv, env, log) if self._fork_server is not None and not self._files else None
        popen = forked or _popen(argv, env, log, self._files)
        assert self._guard is not None and self._guard.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody has killed the guard; the run does not need it
            self._guard.stdin.write(b"%d\n" % popen.pid)
        return popen

    def poll(self) -> None:
        """Note which children have ended. If a child asks for a restart, restart it."""
        for child in self.running():
            code = child.popen.poll()
            if code == AGAIN and not self._stops:
                child.command = child.resume_command or child.command
                with contextlib.suppress(OSError):
                    self.again(child)
                    continue
            if code is not None:
                child.code, child.ended_at = code, time.monotonic()
                child.gone = not orphan_reaper.relatives({child.popen.pid}, "")

    def running(self, role: str = "") -> list[Child]:
        """Return the children that are not known to have ended and whose name begins with `role`."""
        return [child for child in self.children if child.code is None and child.name.startswith(role)]

    def failures(self) -> list[Child]:
        """Return the children that failed and are not excused."""
        return [child for child in self.children if child.failed]

    def start_no_more(self) -> None:
        """Refuse further restarts, because all children are about to be stopped.

        Note their descendants now: some may end before `stop`, and leave shared memory behind.
        """
        self._stops = True
        self._seen = orphan_reaper.relatives(self._groups(), self._family)

    def _groups(self) -> set[int]:
        return {child.popen.pid for child in self.children if not child.gone}

    def stop(self) -> None:
        """End every child and all its descendants: by SIGTERM, by a second SIGTERM, which means at once, then by SIGKILL.

        SIGKILL comes `term_s` seconds after the second SIGTERM.
        """
        self._stops = True
        self.poll()
        groups = self._groups()
        seen = {child.popen.pid for child in self.children} | self._seen
        for number, patience_s in ((signal.SIGTERM, TICK_S), (signal.SIGTERM, self._term_s), (signal.SIGKILL, _KILL_S)):
            told: set[int] = set()
            deadline = time.monotonic() + patience_s
            while left := orphan_reaper.relatives(groups, self._family):
                for pid in left - told:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, number)
                told |= left
                if time.monotonic() >= deadline:
                    break
                time.sleep(TICK_S)
                self.poll()
            seen |= told
        for child in self.running():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.popen.wait(_KILL_S)
        self.poll()
        for child in self.children:
            child.gone = True
        orphan_reaper.remove_shared_memory(seen)
        if self._fork_server is not None:
            self._fork_server.stop()
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None


def _popen(argv: Sequence[str], env: Mapping[str, str], log: Path, files: Sequence[int]) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            list(argv),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=private_files.usual_umask,
            pass_fds=files,
        )


def _start_guard(family: str) -> subprocess.Popen[bytes]:
    """Start the orphan reaper, out of reach of the terminal's signals, and fast: without site packages."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", orphan_reaper.__file__, family],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        start_new_session=True,
    )


def root_cause(failures: Sequence[Child]) -> Child:
    """Return the failure that most likely caused the others.

    A process that failed by itself comes first, then a report on another process, then processes that were told to stop. Among
    equals the earliest comes first. If two were noticed at once, a killed process comes first, then a worker or server.
    """

    def rank(child: Child) -> tuple[int, float, bool, bool]:
        reason = "" if child.code is not None and child.code < 0 else error_in(child.log) or ""
        kind = 2 if _WAS_STOPPED.search(reason) else 1 if _OTHERS_FAILURE.match(reason) else 0
        return kind, child.ended_at, bool(reason), child.name == "coordinator"

    return min(failures, key=rank)


def error_in(log: Path) -> str | None:
    """Return the sentence of the last `error:` line in a log, or None."""
    for line in reversed(_tail(log)):
        if found := _ERROR_LINE.match(line):
            return found[1].strip()
    return None


def last_line(log: Path) -> str:
    """Return the last line of a log that is not blank, or ''."""
    return next((line.strip() for line in reversed(_tail(log)) if line.strip()), "")


def _tail(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            return file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
