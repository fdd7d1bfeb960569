"""Reads the output of scripts from the workers' logs."""

from __future__ import annotations

import re
from pathlib import Path

#: A line of this program's own log.
_OURS = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ roundtable\b|error: ")
#: The most bytes that are read at once while a script runs.
_MOST = 1 << 16


class ScriptOutput:
    """Reads new output from the log of worker-0, or from all workers' logs, without the lines that this program logs itself."""

    def __init__(self, logs: Path, everybody: bool = False) -> None:
        self._logs = logs
        self._pattern = "worker-*.log" if everybody else "worker-0.log"
        self._everybody = everybody
        #: Bytes read of each file, by name and inode. Files that exist already are of an earlier part, and count as read.
        self._read = {(path.name, path.stat().st_ino): path.stat().st_size for path in logs.glob(self._pattern)}
        self._partial: dict[str, bytes] = {}
        self._in_traceback: set[str] = set()

    def lines(self, at_end: bool = False) -> list[str]:
        """Return the lines that have come since the last call, and `at_end` also an unfinished last line."""
        found, most = [], -1 if at_end else _MOST
        for path in sorted(self._logs.glob(self._pattern)):
            *whole, rest = (self._partial.pop(path.stem, b"") + self._new(path, most)).split(b"\n")
            if at_end and rest:
                whole, rest = [*whole, rest], b""
            self._partial[path.stem] = rest
            mark = f"{path.stem}: " if self._everybody else ""
            found += [mark + one.decode("utf-8", "replace") for one in self._kept(path.stem, whole)]
        return found

    def _new(self, path: Path, most: int) -> bytes:
        try:
            with path.open("rb") as file:
                key = path.name, path.stat().st_ino
                file.seek(self._read.get(key, 0))
                found = file.read(most)
        except OSError:
            return b""
        self._read[key] = self._read.get(key, 0) + len(found)
        return found

    def _kept(self, worker: str, lines: list[bytes]) -> list[bytes]:
        """Return the script's own lines, without tracebacks. The launcher itself reports how a script ended."""
        kept = []
        for one in lines:
            text = one.rstrip(b"\r").rpartition(b"\r")[2]  # the last state of a progress bar
            if text.startswith(b"Traceback (most recent call last)"):
                self._in_traceback.add(worker)
            elif worker in self._in_traceback:
                if not text.startswith(b" "):
                    self._in_traceback.discard(worker)
            elif not _OURS.match(text):
                kept.append(text)
        return kept
