"""Errors that are meant to be read by people: one sentence saying what was wrong, where, and what to do."""

from __future__ import annotations

import logging


def printable(text: str) -> str:
    """`text` on one line, without anything that would be more than letters on a terminal or in a log."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


class OneLine(logging.Formatter):
    """Log lines in which names and reasons that others have sent are letters and no more. What comes after a line, such as a
    traceback, is as it is."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


class PsError(Exception):
    """Base of every error this project raises on purpose; its text is a whole sentence for a person."""


class UsageError(PsError):
    """Something the user asked for cannot be: a bad flag, a missing file, a model that does not fit."""


class WireError(PsError):
    """A message that is foreign, stale or malformed. It is refused and counted; it never crashes a process.

    `kind` is what it is counted under (`common/protocol/rejections.py`): "unfit" is what is well-formed and does not fit the run.
    Names that a stranger has sent may stand in `text`, so nothing in it is left that would be more than letters on a terminal or
    in a log.
    """

    def __init__(self, text: str, kind: str = "unfit") -> None:
        super().__init__(printable(text))
        self.kind = kind


class ClusterError(PsError):
    """The run cannot go on: a process is gone, or a deadline passed. Names who was waited for."""


class NoAnswer(ClusterError):
    """Another process has not answered for the whole of a deadline. Names who was waited for."""


class RunStopped(ClusterError):
    """The run was told to stop before its end, and can go on."""


class Stopped(KeyboardInterrupt):
    """A signal has told this process to stop. The text says what became of its work; it may be empty."""

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(text)
        self.number = number
