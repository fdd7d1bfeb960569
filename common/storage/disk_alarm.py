"""An alarm by which the coordinator tells its launcher that it cannot write to the disk.

The alarm is a file in memory. The launcher makes and reads it. The coordinator finds it through its environment.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

VARIABLE = "PS_ALARM"


class Alarm:
    """The launcher's end."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("roundtable-alarm"), "rb", buffering=0)
        #: The variables that the coordinator's environment must have.
        self.env = {VARIABLE: f"/proc/{os.getpid()}/fd/{self._file.fileno()}"}

    @property
    def text(self) -> str:
        """Return what is wrong now, or ''."""
        self._file.seek(0)
        return self._file.read().decode("utf-8", "replace")

    def close(self) -> None:
        self._file.close()


def raise_alarm(text: str) -> None:
    """Have the launcher, if there is one, show `text` until the next call. '' ends the alarm."""
    with contextlib.suppress(OSError, KeyError):
        Path(os.environ[VARIABLE]).write_text(text, encoding="utf-8")
