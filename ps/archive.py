"""What a finished run leaves behind: the trained model and the summary, each written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from common.durable import rename, write_whole
from common.errors import WireError
from common.layout import CHUNK_BYTES
from common.messages import ModelPart
from common.runfiles import MODEL_FILE, SUMMARY_FILE
from common.wire import Frames, bytes_of

#: Parts that a model's file may have: 4 TiB of it.
_MOST_PARTS = 1 << 20
#: Parts after which what is written is waited for to be on the disk, so that it does not take long at the end, when all wait.
_SYNC_PARTS = 16


class ModelFile:
    """Writes down the parts of the model's file that a worker hands in, in any order, and gives it its name at the end."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / MODEL_FILE
        self._temporary = folder / (MODEL_FILE + ".tmp")
        self._there: set[int] = set()
        self._count = 0
        #: SHA-256 over the trained parameters' bytes in name order.
        self.weights_sha256: str | None = None

    def add(self, part: ModelPart, frames: Frames) -> None:
        """Raises WireError for a part that is not what it says, OSError where it cannot be written."""
        data = bytes_of(frames[0]) if len(frames) == 1 else memoryview(b"")
        size_fits = len(data) == CHUNK_BYTES or (part.part == part.parts - 1 and 0 < len(data) < CHUNK_BYTES)
        counts_fit = 0 <= part.part < part.parts <= _MOST_PARTS and (self._count or part.parts) == part.parts
        if not size_fits or not counts_fit:
            raise WireError(f"part {part.part} of {part.parts} of the model is not what it says")
        with self._temporary.open("r+b" if self._there else "wb") as file:
            file.seek(part.part * CHUNK_BYTES)
            file.write(data)
            if len(self._there) % _SYNC_PARTS == _SYNC_PARTS - 1:
                file.flush()
                os.fdatasync(file.fileno())
        self._count = part.parts
        self.weights_sha256 = part.weights_sha256 or self.weights_sha256
        self._there.add(part.part)

    @property
    def complete(self) -> bool:
        return 0 < len(self._there) == self._count

    def finish(self) -> None:
        """Have the file under its name, on the disk."""
        with self._temporary.open("r+b") as file:
            os.fsync(file.fileno())
        rename(self._temporary, self._path)


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    write_whole(folder / SUMMARY_FILE, [(json.dumps(summary, indent=2) + "\n").encode()])


def summarized_run(folder: Path) -> str | None:
    """The run whose summary is in `folder`, if any."""
    try:
        return str(json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
