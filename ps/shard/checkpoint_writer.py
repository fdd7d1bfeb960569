"""Writes a server's file of a checkpoint on a thread, and opens a checkpoint to read it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roundtable.common.protocol.messages.saving import CheckpointStatus
from roundtable.common.protocol.messages.setup import Setup
from roundtable.common.runtime.errors import UsageError
from roundtable.common.runtime.failpoints import failpoint
from roundtable.common.storage import tensor_file
from roundtable.common.storage.checkpoint import TOKEN_FILE, file_of, folder_of
from roundtable.common.storage.checkpoint import read as read_checkpoint
from roundtable.common.storage.tensor_file import Entry, TensorFiles

#: Key of the file's metadata under which a server keeps `CheckpointData.extra` as JSON.
_EXTRA = "extra"
#: Seconds between two calls of `show_life` while `wait` blocks.
_SHOW_LIFE_S = 0.1


@dataclass(frozen=True)
class CheckpointData:
    """A shard's state to write for a TakeCheckpoint. Tensors that `entries` refer to must not change until they are written."""

    round: int
    token: str
    entries: Sequence[Entry]
    extra: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A checkpoint from which a run goes on."""

    round: int
    #: The number of servers that took the checkpoint.
    servers: int
    #: The model of the run.
    setup: Setup
    files: TensorFiles
    #: By server: the values beside tensors. A server without a part of the model wrote no file and has no entry.
    extra: Mapping[int, dict[str, Any]]


def open_source(run_dir: Path, round_: int) -> Source:
    """Return the checkpoint of `round_` in a run directory. Raises UsageError if it cannot be read."""
    found = read_checkpoint(folder_of(run_dir, round_))
    manifest = found.manifest
    wrote = [server for server in range(manifest.servers) if file_of(server) in manifest.files]
    files = TensorFiles(found.folder / file_of(server) for server in wrote)
    extra = {server: json.loads(kept.get(_EXTRA, "{}")) for server, kept in zip(wrote, files.metadata, strict=True)}
    return Source(round_, manifest.servers, manifest.setup, files, extra)


class CheckpointWriter:
    """Writes a server's file of one checkpoint at a time, on a thread.

    If another server fails, the coordinator gives a checkpoint up. So the next one may be requested during a write.
    """

    def __init__(self, server: int, run_dir: Path) -> None:
        self._server = server
        self._run_dir = run_dir
        self._thread: threading.Thread | None = None
        self._result: CheckpointStatus | None = None
        #: The checkpoint to write next. A later request replaces it.
        self._next: CheckpointData | None = None
        #: Bytes written so far, of all files.
        self.bytes = 0

    def start(self, capture: CheckpointData) -> None:
        """Write `capture` on the thread as soon as the write in progress is done. Does not block."""
        self._next = capture
        self._go_on()

    def _go_on(self) -> None:
        if self._next is not None and (self._thread is None or not self._thread.is_alive()):
            capture, self._next, self._result = self._next, None, None
            self._thread = threading.Thread(target=self._write, args=(capture,), name="checkpoint", daemon=True)
            self._thread.start()

    @property
    def busy(self) -> bool:
        """Return True if a checkpoint is being written or waits to be."""
        return self._next is not None or (self._thread is not None and self._thread.is_alive())

    def wait(self, show_life: Callable[[], None]) -> None:
        """Block until no checkpoint is being written. Calls `show_life` every 0.1 s meanwhile."""
        while self._thread is not None:
            self._thread.join(_SHOW_LIFE_S)
            if self._thread.is_alive():
                show_life()
            else:
                self._thread = None
                self._go_on()

    def poll(self) -> CheckpointStatus | None:
        """Return the result of a finished write, once, else None."""
        result, self._result = self._result, None
        self._go_on()
        return result

    def _wrote(self, size: int, round_: int) -> None:
        self.bytes += size
        failpoint("saving", round_)

    def _write(self, capture: CheckpointData) -> None:
        folder = folder_of(self._run_dir, capture.round)
        path = folder / file_of(self._server)
        try:
            if (folder / TOKEN_FILE).read_text(encoding="utf-8") != capture.token:
                raise FileNotFoundError
            metadata = {"format": "pt", _EXTRA: json.dumps(capture.extra)}
            digest, size = tensor_file.write(path, capture.entries, metadata, lambda size: self._wrote(size, capture.round))
            failpoint("saved", capture.round)
            self._result = CheckpointStatus(capture.round, "written", digest, size)
        except FileNotFoundError:
            reason = (
                f"server-{self._server} cannot see {self._run_dir}. Checkpoints need a folder that all hosts of servers share, "
                "at the same path."
            )
            self._result = CheckpointStatus(capture.round, "failed", reason=reason)
        except (OSError, UsageError) as error:
            text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            self._result = CheckpointStatus(
                capture.round, "failed", reason=f"server-{self._server} could not write {path}: {text}."
            )
        except Exception as error:  # a failed checkpoint must not end the run
            reason = f"server-{self._server} could not write {path}: {type(error).__name__}: {error}."
            self._result = CheckpointStatus(capture.round, "failed", reason=reason)
