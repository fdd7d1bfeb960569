"""Tar files as WebDataset has them: members in a row whose paths are the same up to the first dot are one sample."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.data.streams.caches import read_cache, write_cache
from roundtable.worker.data.streams.stream import Lengths, Stream

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def tar_stream(
    shards: str | Path | Sequence[str | Path],
    decode: Callable[[dict[str, Any]], Any] | None = None,
    *,
    samples: Lengths = None,
    cache: str | Path | None = None,
    open_file: Callable[[str], BinaryIO] | None = None,
) -> Stream:
    """Return the stream of tar files in WebDataset's format, as `webdataset.ShardWriter` and `tar --sort=name` write it.

    `shards` are the files' paths. `{000000..000146}` in a path stands for all these numbers. A sample is a dict. It has the bytes
    of each member, by the rest of its name in lower case, such as "jpg" or "seg.png". It also has `__key__`, the members' path up
    to the first dot, and `__url__`, the file. `decode` makes a sample for the script of it.

    Each file's headers are read once, to know where samples begin. Then a file opens at any sample by one seek. `cache` is a
    folder that keeps this, so that later runs need not read the headers. With `samples`, headers are read only of files that are
    opened in the middle. Files that are compressed are read from their start instead.

    `open_file(path)` opens a file that is not on this machine; it must be able to seek: `lambda url: fsspec.open(url).open()`.

    Raises UsageError for files that are missing or damaged, when they are read.
    """
    paths = [shards] if isinstance(shards, str | Path) else list(shards)
    names = [name for path in paths for name in _expanded(str(path))]
    files = TarFiles(open_file or _open, Path(cache) if cache is not None else None)
    stream = Stream(names, files.open, files.count if samples is None else samples, decode=decode)
    stream.kind = "tar_stream"
    stream.reads_from_start = any(Path(name).suffix in _OPENERS for name in names)
    return stream


class TarFiles:
    """Opens tar files at a sample, and knows where samples begin in each file."""

    def __init__(self, open_file: Callable[[str], BinaryIO], cache: Path | None) -> None:
        self._open_file, self._cache = open_file, cache
        #: The byte at which each sample's first header begins, by file.
        self._begins: dict[str, np.ndarray[Any, Any]] = {}

    def open(self, path: str, position: int) -> Iterator[dict[str, Any]]:
        """Yield a file's samples from number `position` on. Raises UsageError if the file is missing or damaged."""
        begins = self._index(path) if position else np.zeros(1, np.int64)
        if position and position >= len(begins):
            return
        with _readable(path), self._open_file(path) as file:
            file.seek(int(begins[position]))
            yield from _samples(path, file)

    def count(self, path: str) -> int:
        """Return the number of samples in a file. Raises UsageError if the file is missing or damaged."""
        return len(self._index(path))

    def _index(self, path: str) -> np.ndarray[Any, Any]:
        if path not in self._begins:
            self._begins[path] = self._read_index(path)
        return self._begins[path]

    def _read_index(self, path: str) -> np.ndarray[Any, Any]:
        """Return where samples begin, from the cache if that is of this very file."""
        name = f"{Path(path).name}-{hashlib.blake2b(path.encode(), digest_size=8).hexdigest()}.json"
        kept = self._cache / name if self._cache is not None else None
        known = read_cache(kept) if kept is not None else {}
        state = _state(path)
        if "begins" not in known or known.get("state") != state:
            with _readable(path), self._open_file(path) as file:
                known = {"state": state, "begins": list(_begins(path, file))}
            if kept is not None:
                write_cache(kept, known)
        return np.array(known["begins"], np.int64)


def _state(path: str) -> list[int] | None:
    """Return numbers that change with a file, as far as they are known here."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _open(path: str) -> BinaryIO:
    opener = _OPENERS.get(Path(path).suffix)
    return opener(path) if opener is not None else Path(path).open("rb")


def _expanded(path: str) -> list[str]:
    """Return the paths that a path with `{first..last}` stands for. Numbers are as wide as `first`."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", path)
    if found is None:
        return [path]
    first, last = found.groups()
    numbers = range(int(first), int(last) + 1)
    return [name for n in numbers for name in _expanded(f"{path[: found.start()]}{n:0{len(first)}}{path[found.end() :]}")]


class _readable:
    """Raise UsageError, with the file's name, for errors of reading it inside the context."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        """Begin to read the file."""

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if isinstance(error, tarfile.TarError | OSError | EOFError | lzma.LZMAError):
            raise UsageError(f"the shard '{self._path}' cannot be read: {str(error) or kind.__name__}.") from None


def _members(file: BinaryIO) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo, str, str]]:
    """Yield the members that belong to a sample, from the place of the file on: the archive, the member, its key and the rest."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # which would grow for ever
            parts = re.fullmatch(r"((?:.*/|)[^./]+)\.([^/]*)", member.name)
            if member.isreg() and parts is not None and not re.match(r"__[^/]*__($|/)", member.name):
                yield archive, member, parts[1], parts[2].lower()


def _begins(path: str, file: BinaryIO) -> Iterator[int]:
    """Yield the byte at which each sample begins."""
    last = None
    for _, member, key, _ in _members(file):
        if key != last:
            yield member.offset
        last = key


def _samples(path: str, file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Yield samples from the place of the file on."""
    sample: dict[str, Any] = {}
    for archive, member, key, rest in _members(file):
        if sample and key != sample["__key__"]:
            yield sample
            sample = {}
        if rest in sample:
            raise UsageError(f"the shard '{path}' has two members '{key}.{rest}' in a row: a sample has each name once.")
        data = archive.extractfile(member)
        assert data is not None
        sample = sample or {"__key__": key, "__url__": path}
        sample[rest] = data.read()
    if sample:
        yield sample
