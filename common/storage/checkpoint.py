"""Checkpoints on disk: RUN/checkpoints/round-00000120 holds a file of each server and, written last, a manifest.

A checkpoint has every update before its round, and nothing of later ones. Its files are safetensors, which plain PyTorch reads
without this project. A folder without a manifest is no checkpoint. If files are not what the manifest says, the checkpoint is
damaged, and the one before is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from roundtable.common.protocol.messages.setup import Setup
from roundtable.common.runtime.errors import UsageError
from roundtable.common.runtime.versions import Versions, versions_here
from roundtable.common.storage.atomic_files import sync_folder, write_whole

FOLDER = "checkpoints"
MANIFEST_FILE = "manifest.json"
TOKEN_FILE = "token"
#: Version of the format that is written and read here.
FORMAT = 1

_NAME = re.compile(r"round-(\d{8,})")
_PIECE_BYTES = 4 << 20


class FileEntry(msgspec.Struct, frozen=True):
    """A file of a checkpoint: its SHA-256 in hexadecimal digits, and its size in bytes."""

    sha256: str
    bytes: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of a checkpoint: every update before `round` of run `run`, whose model and optimizer are `setup`. `versions`
    wrote it."""

    format: int = FORMAT
    versions: Versions = Versions()
    run: str
    round: int
    servers: int
    setup: Setup
    settings: dict[str, Any]
    files: dict[str, FileEntry]


class _Format(msgspec.Struct, frozen=True):
    """The part of a manifest that any format has."""

    format: int
    versions: Versions = Versions()


class _OtherFormat(UsageError):
    """This version of the program does not know the checkpoint's format."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest could be read."""

    folder: Path
    manifest: Manifest

    @property
    def paths(self) -> list[Path]:
        return [self.folder / name for name in sorted(self.manifest.files)]

    def damage(self) -> str:
        """Return what is wrong with the files, in a sentence, or ''."""
        for name, entry in sorted(self.manifest.files.items()):
            path = self.folder / name
            try:
                digest, size = _hash(path)
            except OSError as error:
                return f"{path} cannot be read: {error.strerror or error}."
            if size != entry.bytes:
                return f"{path} has {size} bytes instead of {entry.bytes}."
            if digest != entry.sha256:
                return f"{path} is damaged: its SHA-256 is not the manifest's."
        return ""


def folder_of(run_dir: Path, round_: int) -> Path:
    """Return the folder of the checkpoint of `round_`, whether it exists or not."""
    return run_dir / FOLDER / f"round-{round_:08d}"


def round_of(folder: Path) -> int:
    """Return the round of the checkpoint in `folder`, by its name."""
    return int(folder.name.rpartition("-")[2])


def file_of(server: int) -> str:
    """Return the name of a server's file in a checkpoint."""
    return f"server-{server}.safetensors"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make the files in `folder` a checkpoint. Raise OSError if that fails."""
    (folder / TOKEN_FILE).unlink(missing_ok=True)
    write_whole(folder / MANIFEST_FILE, [msgspec.json.format(msgspec.json.encode(manifest), indent=1)])
    for above in (folder.parent, folder.parent.parent):
        sync_folder(above)


def read(folder: Path) -> Checkpoint:
    """Return the checkpoint in `folder`. Raise UsageError if there is none, or one of another format."""
    path = folder / MANIFEST_FILE
    try:
        data = path.read_bytes()
        written = msgspec.json.decode(data, type=_Format)
        if written.format != FORMAT:
            raise _OtherFormat(
                f"the checkpoint {folder} was made by {written.versions} in format {written.format}, and this is "
                f"{versions_here()}, which reads format {FORMAT}: use the other version, or start a new run."
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except FileNotFoundError:
        raise UsageError(f"{folder} is no checkpoint, or one that was not finished: it has no {MANIFEST_FILE}.") from None
    except _OtherFormat:
        raise
    except (OSError, msgspec.DecodeError, UsageError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from None
    return Checkpoint(folder, manifest)


def check_versions(checkpoint: Checkpoint, accepted: bool) -> str:
    """Return a sentence if another version of the program or of torch wrote the checkpoint, else ''.

    Raise UsageError if it is another version and not `accepted`.
    """
    was, here = checkpoint.manifest.versions, versions_here()
    if was == here:
        return ""
    text = f"the checkpoint {checkpoint.folder} was made by {was}, and this is {here}; results may differ in the last bits"
    if not accepted:
        raise UsageError(f"{text}. Use the other version, or give --allow-version-mismatch.")
    return f"{text}."


def folders(run_dir: Path) -> list[Path]:
    """Return the folders of checkpoints in a run directory, finished or not, oldest round first."""
    try:
        found = [path for path in (run_dir / FOLDER).iterdir() if _NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"the checkpoints in {run_dir} cannot be read: {error.strerror or error}.") from None
    return sorted(found, key=lambda path: (len(path.name), path.name))


def finished(run_dir: Path) -> list[Path]:
    """Return those of `folders` that hold a manifest. The others were being written when the run was stopped."""
    return [folder for folder in folders(run_dir) if (folder / MANIFEST_FILE).exists()]


def size(run_dir: Path) -> int:
    """Return the bytes of all finished checkpoints together."""
    return sum(path.stat().st_size for folder in finished(run_dir) for path in folder.iterdir())


def newest(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that is whole, and a sentence for each newer one on what is wrong with it.

    Raise UsageError if a newer one is of another format: the run would not go on from the newest then.
    """
    problems = []
    for folder in reversed(finished(run_dir)):
        try:
            checkpoint = read(folder)
        except _OtherFormat:
            raise
        except UsageError as error:
            problems.append(str(error))
            continue
        if damage := checkpoint.damage():
            problems.append(damage)
            continue
        return checkpoint, problems
    return None, problems


def remove(folder: Path) -> None:
    """Remove a checkpoint's folder, the manifest first, so that the rest never counts as a checkpoint."""
    with contextlib.suppress(OSError):
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _hash(path: Path) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            size += len(piece)
    return digest.hexdigest(), size
