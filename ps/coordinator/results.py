"""The results of a finished run: the trained model and the summary, each written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from roundtable.common.protocol.messages.setup import InFile, Setup
from roundtable.common.runtime.errors import WireError
from roundtable.common.storage.atomic_files import rename, write_whole
from roundtable.common.storage.run_files import MODEL_FILE, SUMMARY_FILE
from roundtable.common.storage.safetensors_header import BUFFERS, header, size_of
from roundtable.ps.model_parts import Span

#: The file is synced to the disk after this many bytes, so that the end is quick. And: bytes that are hashed at a time.
_SYNC_BYTES, _HASH_BYTES = 64 << 20, 8 << 20


class ModelFile:
    """Writes and hashes the model's file. Its bytes come in any order. At the end the file gets its name."""

    def __init__(
        self, folder: Path, file: Sequence[InFile], sizes: Sequence[int], rules: Mapping[str, str] | None = None
    ) -> None:
        """Plan a file with the tensors in `file` (see `ps/validation.py`), without writing it.

        `sizes` are the bytes of the model's tensors. `rules` say how buffers were merged, by their names in the file.
        """
        self._path = folder / MODEL_FILE
        self._temporary = folder / (MODEL_FILE + ".tmp")
        self._file = file
        self._rules = json.dumps(rules or {})
        #: By the tensor's number in `InFile`: the places in the file where it begins, one for each of its names.
        self._places: dict[int, list[int]] = {}
        #: Bytes of each tensor, by number.
        self._sizes = sizes
        #: Missing bytes of each tensor, by number.
        self._missing: dict[int, int] = {}
        self._digest = hashlib.sha256()
        #: (number of the tensor, place in the file, length) of the bytes that are not hashed yet.
        self._to_hash: list[tuple[int, int, int]] = []
        #: Bytes written since the last sync.
        self._unsynced = 0
        #: True once the file has its name.
        self.complete = False
        #: SHA-256 over the bytes of the model's parameters in the order of their names, once it is complete.
        self.weights_sha256: str | None = None
        at = len(self._header("0" * 64))
        for entry in file:
            for number in entry.of:
                self._places.setdefault(number, []).append(at)
                self._missing[number] = sizes[number]
                if entry.counts and sizes[number]:
                    self._to_hash.append((number, at, sizes[number]))
                at += sizes[number]
        self._bytes = at

    def begin(self) -> None:
        """Make the temporary file. Raises OSError if it cannot be written."""
        with self._temporary.open("wb") as out:
            out.truncate(self._bytes)

    def restore(self, weights_sha256: str) -> None:
        """Take over the file that an earlier coordinator has completed, if the file is still there."""
        if self._path.is_file() and self._path.stat().st_size == self._bytes:
            self.complete, self.weights_sha256, self._to_hash, self._missing = True, weights_sha256, [], {}

    def _header(self, sha256: str) -> bytes:
        tensors = [(entry.name, entry.dtype, entry.shape, size_of(entry.dtype, entry.shape)) for entry in self._file]
        return header(tensors, {"format": "pt", "weights_sha256": sha256, BUFFERS: self._rules})

    def write(self, pieces: Iterable[tuple[Span, memoryview]]) -> None:
        """Write bytes where they belong. Skip tensors that are not in the file. Raises OSError if that fails."""
        with self._temporary.open("r+b", buffering=0) as out:
            done = []
            for span, data in pieces:
                for at in self._places.get(span.of, ()):
                    _write_at(out.fileno(), data, at + span.start)
                    self._unsynced += len(data)
                done.append(span)
            if self._unsynced >= _SYNC_BYTES:
                os.fdatasync(out.fileno())
                self._unsynced = 0
        for span in done:
            if span.of in self._missing:
                self._missing[span.of] -= span.length

    def hash_some(self) -> bool:
        """Hash some of the bytes that have arrived. Return whether more can be hashed now."""
        if not self._to_hash or self._missing[self._to_hash[0][0]]:
            return False
        of, at, left = self._to_hash[0]
        with self._temporary.open("rb") as file:
            file.seek(at)
            data = file.read(min(left, _HASH_BYTES))
        self._digest.update(data)
        if len(data) < left:
            self._to_hash[0] = of, at + len(data), left - len(data)
        else:
            self._to_hash.pop(0)
        return bool(self._to_hash) and not self._missing[self._to_hash[0][0]]

    @property
    def hashed(self) -> bool:
        """Return whether all bytes have arrived and are hashed, so that `finish` may be called."""
        return not self.complete and not self._to_hash and not any(self._missing.values())

    def finish(self) -> None:
        """Write the file to the disk and give it its name. Raises OSError if that fails."""
        digest = self._digest.hexdigest()
        with self._temporary.open("r+b") as file:
            file.write(self._header(digest))
            file.flush()
            os.fsync(file.fileno())
        rename(self._temporary, self._path)
        self.complete, self.weights_sha256 = True, digest

    def revise(self, names: Sequence[str], values: Sequence[memoryview]) -> None:
        """Replace tensors of the complete file. Meanwhile the file has its temporary name, so no process reads a part of it.

        Raises WireError if a name or a size does not fit the file, and OSError if the file cannot be written.
        """
        if not self.complete or len(names) != len(values):
            raise WireError("tensors were recomputed for a model that is not complete, or sent without their values")
        known = {entry.name: entry.of[0] for entry in self._file if len(entry.of) == 1 and not entry.counts}
        for name, data in zip(names, values, strict=True):
            if name not in known or self._sizes[known[name]] != len(data):
                raise WireError(f"'{name[:100]}' was recomputed, but the model's file has no such tensor that may be replaced")
        if self._path.exists():  # if not, an earlier try failed half-way
            if self._path.stat().st_nlink > 1:  # it is saved under another name too
                shutil.copyfile(self._path, self._temporary)
            else:
                rename(self._path, self._temporary)
        with self._temporary.open("r+b", buffering=0) as out:
            for name, data in zip(names, values, strict=True):
                for at in self._places[known[name]]:
                    _write_at(out.fileno(), data, at)
            os.fsync(out.fileno())
        rename(self._temporary, self._path)

    def save_as(self, path: Path) -> None:
        """Give the complete file a second name, in place of any file of that name. Raises OSError if that fails."""
        path.parent.mkdir(exist_ok=True)
        other = path.with_name(path.name + ".tmp")
        other.unlink(missing_ok=True)
        other.hardlink_to(self._path)
        rename(other, path)

    def discard(self) -> None:
        """Delete the file, because training goes on."""
        (self._path if self.complete else self._temporary).unlink(missing_ok=True)


def rules_in(setup: Setup) -> dict[str, str]:
    """Return by name in the model's file the rule that merges each buffer."""
    known = dict(enumerate(setup.tensors))
    named = {entry.name: known[entry.of[0]] for entry in setup.file if len(entry.of) == 1 and entry.of[0] in known}
    return {name: spec.rule for name, spec in named.items() if spec.is_buffer}


def _write_at(file: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(file, data, at)
        at, data = at + written, data[written:]


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    write_whole(folder / SUMMARY_FILE, [(json.dumps(summary, indent=2) + "\n").encode()])


def summarized_run(folder: Path) -> str | None:
    """Return the run whose summary is in `folder`, if any."""
    try:
        return str(json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
