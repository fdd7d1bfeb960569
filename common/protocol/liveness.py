"""Signs of life from a process to its starter, by a pipe, so that the starter can end a process that hangs.

The launcher of a whole run reads in the event log which processes are lost. On other hosts no process can.
"""

from __future__ import annotations

import contextlib
import os
from time import monotonic

from roundtable.common.protocol.transport import HEARTBEAT_S, STOPPED_S

#: Environment variable with the file number that signs are written to.
VARIABLE = "PS_SIGNS_TO"
#: Bytes that are read at once. A sign has a few bytes.
_MOST_BYTES = 1 << 16


class Signs:
    """Gives signs of life to the starter of this process, if it listens. Otherwise it does nothing."""

    def __init__(self) -> None:
        number = os.environ.get(VARIABLE, "")
        self._file = int(number) if number.isdigit() else -1
        self._given_at = float("-inf")

    def give(self, silence_s: float) -> None:
        """Say that this process lives, unless it has just said so, and that it hangs if no sign comes for `silence_s` seconds."""
        if self._file >= 0 and (now := monotonic()) >= self._given_at + HEARTBEAT_S:
            self._given_at = now
            self._write(silence_s)

    def pause(self) -> None:
        """Say that the next sign may take any time."""
        if self._file >= 0:
            self._write(float("inf"))

    def _write(self, silence_s: float) -> None:
        with contextlib.suppress(OSError):  # the starter does not listen, or has not read for so long that the pipe is full
            os.write(self._file, b"%g\n" % silence_s)


class Listener:
    """The starter's end of the pipe. `write` is the other end, which the started process must have."""

    def __init__(self) -> None:
        self._read, self.write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self.write, False)
        self._heard_at = self._looked_at = monotonic()
        self._silence_s = float("inf")

    def begins(self) -> None:
        """Note that the process is started again. Until its first sign it may be silent for any time."""
        self._take()
        self._silence_s = float("inf")

    def hangs(self, now: float) -> bool:
        """Return whether the process has been silent for longer than it said. Time without calls of this does not count."""
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
