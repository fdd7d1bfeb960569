"""An alarm of the coordinator's that its launcher sees although nothing can be written to the disk.

It is a file in memory, which the launcher makes and reads, and the coordinator finds by its environment.
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
        #: What is to be in the coordinator's environment.
        self.env = {VARIABLE: f"/proc/{os.getpid()}/fd/{self._file.fileno()}"}

    @property
    def text(self) -> str:
        """What is wrong now, '' if nothing."""
        self._file.seek(0)
        return self._file.read().decode("utf-8", "replace")

    def close(self) -> None:
        self._file.close()


def sound(text: str) -> None:
    """Have the launcher, if there is one, show `text` until this is called again; '' is the end of the alarm."""
    with contextlib.suppress(OSError, KeyError):
        Path(os.environ[VARIABLE]).write_text(text, encoding="utf-8")
