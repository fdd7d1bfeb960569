"""Standard output, error output and names. No fault of theirs ends a run."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from roundtable.common.runtime.errors import UsageError


class Forgiving(io.TextIOBase):
    """A text stream whose writes never fail. Text that `stream` cannot take is lost.

    A full disk may have room again, so each write is tried. A pipe without a reader stays broken.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def give_up(self) -> None:
        """Drop the text that could not be written until now, so that a later flush does not fail."""
        try:
            self._stream.flush()
        except OSError:
            silence(self._stream.fileno())


@contextlib.contextmanager
def forgiving_output() -> Iterator[None]:
    """Lose printed text that cannot be written, for the time of the context. A run is worth more than the lines about it."""
    before = sys.stdout, sys.stderr
    streams = [Forgiving(stream) for stream in before]
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            stream.give_up()


def open_standard_streams() -> None:
    """Open /dev/null for each standard stream that the caller has closed, as `>&-` does. Make every character printable."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def check_names(argv: Sequence[str]) -> None:
    """Check that the names on the command line, and the name of the working directory, are text.

    If the locale cannot read one of them, restart the program in Python's UTF-8 mode. Raises UsageError for a name that is not
    UTF-8 either.
    """
    odd = next((name for name in (*argv, str(Path.cwd())) if not _is_text(name)), None)
    if odd is None:
        return
    if not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"  # for the processes that this one starts
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    raise UsageError(f"the name {os.fsencode(odd)!r} is not UTF-8: give it another name, such as {_readable(odd)!a}.")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _readable(name: str) -> str:
    return "".join(char if char.isascii() else "_" for char in name)


def silence(descriptor: int) -> None:
    """Send all further output of `descriptor` to /dev/null."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
