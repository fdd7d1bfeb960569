"""What a finished run leaves behind: the trained model and the summary, each written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import WireError
from common.layout import CHUNK_BYTES
from common.messages import ModelPart
from common.wire import Frames, bytes_of

MODEL_FILE = "model.safetensors"
SUMMARY_FILE = "summary.json"


class ModelFile:
    """Collects the parts of the model's file that a worker hands in, in any order."""

    def __init__(self) -> None:
        self._parts: dict[int, bytes] = {}
        self._count = 0
        #: SHA-256 over the trained parameters' bytes in name order.
        self.weights_sha256: str | None = None

    def add(self, part: ModelPart, frames: Frames) -> None:
        """Raises WireError for a part that is not what it says."""
        data = bytes(bytes_of(frames[0])) if len(frames) == 1 else b""
        if not 0 < len(data) <= CHUNK_BYTES or not 0 <= part.part < part.parts or (self._count or part.parts) != part.parts:
            raise WireError(f"part {part.part} of {part.parts} of the model is not what it says")
        self._count = part.parts
        self.weights_sha256 = part.weights_sha256
        self._parts[part.part] = data

    @property
    def complete(self) -> bool:
        return 0 < len(self._parts) == self._count

    def write(self, folder: Path) -> None:
        write_whole(folder / MODEL_FILE, (self._parts[i] for i in range(self._count)))


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    write_whole(folder / SUMMARY_FILE, [(json.dumps(summary, indent=2) + "\n").encode()])


def write_whole(path: Path, data: Iterable[bytes]) -> None:
    """Write a file so that after a crash it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
