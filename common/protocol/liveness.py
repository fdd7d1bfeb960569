"""Signs of life that a process gives whoever started it, by a pipe: one that hangs can then be ended by its starter alone.

Where the starter is the launcher of a whole run, it reads in the event log who is lost; on other hosts nobody can.
"""

from __future__ import annotations

import contextlib
import os
from time import monotonic

from roundtable.common.protocol.transport import HEARTBEAT_S, STOPPED_S

#: Environment variable with the number of the file by which signs are given.
VARIABLE = "PS_SIGNS_TO"
#: Bytes that are read at once, of signs that are a few each.
_MOST_BYTES = 1 << 16


class Signs:
    """Gives signs to the process that has started this one, if that listens; else does nothing."""

    def __init__(self) -> None:
        number = os.environ.get(VARIABLE, "")
        self._file = int(number) if number.isdigit() else -1
        self._given_at = float("-inf")

    def give(self, silence_s: float) -> None:
        """Say that this process lives, unless it has just said so, and hangs once it has been silent for `silence_s` seconds."""
        if self._file >= 0 and (now := monotonic()) >= self._given_at + HEARTBEAT_S:
            self._given_at = now
            self._write(silence_s)

    def pause(self) -> None:
        """Say that it may take as long as it likes until the next sign."""
        if self._file >= 0:
            self._write(float("inf"))

    def _write(self, silence_s: float) -> None:
        with contextlib.suppress(OSError):  # nobody listens, or has for so long that there is no room
            os.write(self._file, b"%g\n" % silence_s)


class Listener:
    """The starter's end of the pipe. `write` is the other one, which the process that is started must have."""

    def __init__(self) -> None:
        self._read, self.write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self.write, False)
        self._heard_at = self._looked_at = monotonic()
        self._silence_s = float("inf")

    def begins(self) -> None:
        """The process is started anew: until its first sign it may be silent for as long as it likes."""
        self._take()
        self._silence_s = float("inf")

    def hangs(self, now: float) -> bool:
        """Whether the process has been silent for as long as it said that it never is, not counting while nobody looked."""
        if now - self._looked_at > STOPPED_S:
            self._heard_at += now - self._looked_at
        self._looked_at = now
        if said := self._take().split():
            self._heard_at = now
            with contextlib.suppress(ValueError):
                self._silence_s = float(said[-1])
        return now - self._heard_at > self._silence_s

    def _take(self) -> bytes:
        try:
            return os.read(self._read, _MOST_BYTES)
        except OSError:
            return b""

    def close(self) -> None:
        os.close(self._read)
        os.close(self.write)
