"""Write and read safetensors files piece by piece, so that no process has a file in memory beside its contents."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from roundtable.common.model.tensor_bytes import to_frame
from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage import safetensors_header

#: Bytes that are hashed and written at a time. After these the writer waits for the disk, so that memory does not fill up, and
#: `wrote` tells of bytes that are on the disk.
_PIECE_BYTES, _SYNC_BYTES = 4 << 20, 64 << 20


@dataclass(frozen=True)
class Entry:
    """A tensor of a file. Its elements are those of `parts`, one after another.

    With a `dtype`, parts may be made one by one, when they are written.
    """

    name: str
    shape: Sequence[int]
    parts: Iterable[torch.Tensor]
    dtype: torch.dtype | None = None


def header(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Return the beginning of a safetensors file. Its tensors follow, contiguous and in this order."""
    fields = [(n, name_of(dtype), shape, dtype.itemsize * torch.Size(shape).numel()) for n, (dtype, shape) in tensors.items()]
    return safetensors_header.header(fields, metadata)


def name_of(dtype: torch.dtype) -> str:
    """Return safetensors' name of a dtype."""
    empty = save({"": torch.empty(0, dtype=dtype)})
    name: str = json.loads(empty[8 : 8 + int.from_bytes(empty[:8], "little")])[""]["dtype"]
    return name


def write(
    path: Path, entries: Iterable[Entry], metadata: Mapping[str, str], wrote: Callable[[int], None] = lambda size: None
) -> tuple[str, int]:
    """Write a file down to the disk. Return its SHA-256 in hexadecimal digits, and its size in bytes.

    `wrote` is called with the number of bytes of each piece that is written. Raise OSError if writing fails; then the file is not
    whole.
    """
    entries = list(entries)
    digest, size, synced = hashlib.sha256(), 0, 0
    with path.open("wb") as file:
        head = header({e.name: (e.dtype or next(iter(e.parts)).dtype, e.shape) for e in entries}, metadata)
        for data in itertools.chain([memoryview(head)], (to_frame(part) for entry in entries for part in entry.parts)):
            for start in range(0, len(data), _PIECE_BYTES):
                piece = bytes(data[start : start + _PIECE_BYTES])  # a copy: the digest and the file get the same bytes
                digest.update(piece)
                file.write(piece)
                size += len(piece)
                if size >= synced + _SYNC_BYTES:
                    synced = size
                    file.flush()
                    os.fdatasync(file.fileno())
                wrote(len(piece))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), size


class TensorFiles:
    """The tensors of several files, by name. Each is read when it is asked for."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Open the files. Raise UsageError if one cannot be read, or is no safetensors file."""
        self.metadata: list[dict[str, str]] = []
        #: Called each time that something is read, because reading all may take long.
        self.on_read: Callable[[], None] = lambda: None
        self._files: dict[str, Any] = {}
        #: The place at which the elements of each tensor begin.
        self._places: dict[str, tuple[Path, int]] = {}
        self._below: dict[tuple[str, str], list[str]] = {}
        for path in paths:
            try:
                file: Any = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UsageError(f"{path} cannot be read as a safetensors file: {error}.") from None
            self.metadata.append(file.metadata() or {})
            with path.open("rb") as whole:
                size = int.from_bytes(whole.read(8), "little")
                fields = json.loads(whole.read(size))
            for name in file.keys():  # noqa: SIM118 - it is no dict
                self._files[name] = file
                self._places[name] = path, 8 + size + fields[name]["data_offsets"][0]
                self._index(name)

    def _index(self, name: str) -> None:
        first, _, rest = name.partition("/")
        middle, _, last = rest.partition("/")
        self._below.setdefault((first, last), []).append(middle)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def below(self, first: str, last: str) -> list[str]:
        """Return everything that stands for * in names like first/*/last, without slashes."""
        return self._below.get((first, last), [])

    def __getitem__(self, name: str) -> torch.Tensor:
        self.on_read()
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, end: int) -> torch.Tensor:
        """Return rows start..end-1 of a tensor in memory of their own.

        The tensor must exist. A caller that goes through all rows never has all of them in memory, as with mapped files.
        """
        self.on_read()
        none: torch.Tensor = self._files[name].get_slice(name)[:0]
        path, begin = self._places[name]
        rows = torch.empty(end - start, *none.shape[1:], dtype=none.dtype)
        data = to_frame(rows)
        with path.open("rb") as file:
            file.seek(begin + start * (data.nbytes // max(end - start, 1)))
            if file.readinto(data) != data.nbytes:
                raise UsageError(f"{path} ends before '{name}' does: it has changed while it was read.")
        return rows
