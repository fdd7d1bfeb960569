"""Errors that are meant to be read by people: one sentence saying what was wrong, where, and what to do."""

from __future__ import annotations

import logging
import sys
from pathlib import Path


def printable(text: str) -> str:
    """Return `text` on one line, with nothing but letters for a terminal or a log."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


class OneLine(logging.Formatter):
    """Format log lines so that names and reasons from other processes are letters only. The text after a line, such as a
    traceback, is left as it is."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


class PsError(Exception):
    """Base of every error that this project raises on purpose. Its text is a whole sentence for a person."""


class UsageError(PsError):
    """Something the user asked for cannot be: a bad flag, a missing file, a model that does not fit."""


class WireError(PsError):
    """A message that is foreign, stale or malformed. It is refused and counted, and never crashes a process.

    `kind` is the kind under which it is counted (`common/protocol/rejections.py`). "unfit" messages are well-formed and do not
    fit the run. `text` may have names that a stranger has sent, so only letters are left in it.
    """

    def __init__(self, text: str, kind: str = "unfit") -> None:
        super().__init__(printable(text))
        self.kind = kind


class ClusterError(PsError):
    """The run cannot go on: a process is gone, or a deadline passed. The text names the process that was waited for."""


class NoAnswer(ClusterError):
    """Another process has not answered in time. The text names that process."""


class RunStopped(ClusterError):
    """The run was told to stop before its end. It can go on later."""


class Stopped(KeyboardInterrupt):
    """A signal has told this process to stop. The text says what became of its work, or is empty."""

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(text)
        self.number = number


def at_script_line(text: object) -> UsageError:
    """Return the error of a wrong call, with the place in the user's script before `text`."""
    return UsageError(f"{script_line()}: {text}")


def script_line() -> str:
    """Return the place in the user's script from which this package was called, such as 'train.py line 12'.

    The script may have called torch, and torch this package.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in ("roundtable", "torch"):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name} line {frame.f_lineno}"
