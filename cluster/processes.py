"""Child processes that are watched together and leave nothing behind.

Each child has its own session, hence process group, and its own log file. A child's group holds what the child starts in
turn, such as processes that load data, so stopping the group stops those too, even after the child itself has died.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil  # type: ignore[import-untyped,unused-ignore]

from cluster.lifeline import PARENT_VARIABLE

#: Seconds that a child has to end by itself after SIGTERM, before SIGKILL.
TERM_S = 2.0
#: How often waiting loops look.
TICK_S = 0.05

_TAIL_BYTES = 16 << 10
_ERROR_LINE = re.compile(r"^(?:\S+: )?error: (.+)$")
_OTHERS_FAILURE = re.compile(r"^(?:worker|server)-\d+ failed: ")
_TOLD_TO_STOP = re.compile(r"\b(?:stopped because|told to stop)\b")


@dataclass
class Child:
    """A process that was started. `code` is None while it runs, else its exit code, or minus the signal that killed it."""

    name: str
    log: Path
    popen: subprocess.Popen[bytes]
    code: int | None = None
    #: When the end was noticed, on the clock of time.monotonic.
    ended_at: float = 0.0
    #: Whether nothing of its process group is left.
    gone: bool = field(default=False, repr=False)

    @property
    def failed(self) -> bool:
        return bool(self.code)

    def describe_end(self) -> str:
        """One sentence on how and why it ended, for one that failed."""
        assert self.code is not None
        where = f"its log is {self.log}."
        if self.code < 0:
            return f"{self.name} was killed by signal {-self.code} ({_signal_name(-self.code)}); {where}"
        reason = error_in(self.log)
        if reason is None:
            last = last_line(self.log)
            return f"{self.name} failed with exit code {self.code}" + (f": {last}; {where}" if last else f" and no word; {where}")
        if _OTHERS_FAILURE.match(reason):
            return f"{reason.rstrip('.')}; {where}"
        return f"{self.name} failed: {reason.rstrip('.')}; {where}"


class Processes:
    """Children with logs in the folder `log_dir`. As a context, it stops them all at its end."""

    def __init__(self, log_dir: Path, env: Mapping[str, str], term_s: float = TERM_S) -> None:
        """`env` is the environment that children get, with what `start` adds."""
        self.children: list[Child] = []
        self._log_dir = log_dir
        self._env = {**env, PARENT_VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        self._term_s = term_s

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self, name: str, argv: Sequence[str], **env: str) -> Child:
        """Start a child; all it prints goes to `<name>.log`. OSError if it cannot be started."""
        self._log_dir.mkdir(parents=True, exist_ok=True)
        log = self._log_dir / f"{name}.log"
        with log.open("wb") as file:
            popen = subprocess.Popen(
                list(argv),
                env={**self._env, **env},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        child = Child(name, log, popen)
        self.children.append(child)
        return child

    def poll(self) -> None:
        """Note which children have ended."""
        for child in self.running():
            code = child.popen.poll()
            if code is not None:
                child.code, child.ended_at = code, time.monotonic()
                child.gone = not group_members({child.popen.pid})

    def running(self, role: str = "") -> list[Child]:
        """Children not known to have ended whose name begins with `role`."""
        return [child for child in self.children if child.code is None and child.name.startswith(role)]

    def failures(self) -> list[Child]:
        """Children that ended other than with exit code 0."""
        return [child for child in self.children if child.failed]

    def stop(self) -> None:
        """End every child and all that is left of its group: SIGTERM, and after `term_s` seconds SIGKILL."""
        self.poll()
        groups = {child.popen.pid for child in self.children if not child.gone}
        for child in self.running():
            groups |= _groups_of(_descendants(child.popen.pid)) - {os.getpgrp()}
        if not groups:
            return
        for number, patience_s in ((signal.SIGTERM, self._term_s), (signal.SIGKILL, 1.0)):
            for group in groups:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(group, number)
            deadline = time.monotonic() + patience_s
            while True:
                self.poll()
                left = {child.popen.pid for child in self.running()} | _groups_of(group_members(groups))
                if not left:
                    break
                groups = left
                if time.monotonic() >= deadline:
                    break
                time.sleep(TICK_S)
            if not left:
                break
        for child in self.children:
            child.gone = True


def root_cause(failures: Sequence[Child]) -> Child:
    """The failure among `failures` that most likely brought about the others.

    A process that failed by itself comes before the coordinator's report on another, and that before those that were told
    to stop; among equals the first counts, and where two were noticed at once, one that was killed, then a worker or server.
    """

    def rank(child: Child) -> tuple[int, float, bool, bool]:
        reason = "" if child.code is not None and child.code < 0 else error_in(child.log) or ""
        kind = 2 if _TOLD_TO_STOP.search(reason) else 1 if _OTHERS_FAILURE.match(reason) else 0
        return kind, child.ended_at, bool(reason), child.name == "coordinator"

    return min(failures, key=rank)


def group_members(groups: set[int]) -> list[int]:
    """Process ids of all that live in one of these process groups; the dead that nobody has collected do not count."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getpgid(pid) in groups and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def _descendants(pid: int) -> list[int]:
    with contextlib.suppress(psutil.Error):
        return [process.pid for process in psutil.Process(pid).children(recursive=True)]
    return []


def _groups_of(pids: Sequence[int]) -> set[int]:
    groups = set()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            groups.add(os.getpgid(pid))
    return groups


def error_in(log: Path) -> str | None:
    """The sentence of the last `error:` line in a log, or None."""
    for line in reversed(_tail(log)):
        if found := _ERROR_LINE.match(line):
            return found[1].strip()
    return None


def last_line(log: Path) -> str:
    """The last line of a log that is not blank, or ''."""
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
