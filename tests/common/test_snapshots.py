"""Snapshots as folders: a whole one is found, whatever lies beside it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from common import snapshots
from common.errors import UsageError
from common.layout import TensorSpec
from common.messages import Setup, Update
from common.snapshots import FileEntry, Manifest

SETUP = Setup([TensorSpec("w", [2], "float32", 0)], Update("SGD", [{"lr": 0.1}]))


def make(run_dir: Path, round_: int, content: bytes = b"content") -> Path:
    folder = snapshots.folder_of(run_dir, round_)
    folder.mkdir(parents=True)
    (folder / snapshots.TOKEN_FILE).write_text("token")
    (folder / snapshots.file_of(0)).write_bytes(content)
    files = {snapshots.file_of(0): FileEntry(hashlib.sha256(content).hexdigest(), len(content))}
    snapshots.write_manifest(folder, Manifest(run="r", round=round_, servers=1, setup=SETUP, settings={}, files=files))
    return folder


def test_the_newest_is_used_and_its_manifest_is_what_was_written(tmp_path: Path) -> None:
    make(tmp_path, 5)
    make(tmp_path, 100_000_000)
    make(tmp_path, 99_999_999)
    found, problems = snapshots.newest(tmp_path)
    assert found is not None and not problems
    assert (found.manifest.round, found.manifest.setup) == (100_000_000, SETUP)
    assert found.damage() == ""


@pytest.mark.parametrize("content", [b"contenT", b"conten", None])
def test_one_that_is_damaged_is_named_and_the_one_before_it_used(tmp_path: Path, content: bytes | None) -> None:
    make(tmp_path, 5)
    path = make(tmp_path, 6) / snapshots.file_of(0)
    path.unlink() if content is None else path.write_bytes(content)
    found, problems = snapshots.newest(tmp_path)
    assert found is not None and found.manifest.round == 5
    assert len(problems) == 1 and str(path) in problems[0]


def test_one_that_was_not_finished_is_none(tmp_path: Path) -> None:
    make(tmp_path, 5)
    (make(tmp_path, 6) / snapshots.MANIFEST_FILE).unlink()
    found, problems = snapshots.newest(tmp_path)
    assert found is not None and found.manifest.round == 5 and not problems


def test_a_manifest_that_cannot_be_read_or_is_of_another_format_is_told(tmp_path: Path) -> None:
    broken, newer = make(tmp_path, 5) / snapshots.MANIFEST_FILE, make(tmp_path, 6) / snapshots.MANIFEST_FILE
    broken.write_bytes(broken.read_bytes()[:-20])
    newer.write_bytes(newer.read_bytes().replace(b'"format": 1', b'"format": 2'))
    found, problems = snapshots.newest(tmp_path)
    assert found is None and len(problems) == 2
    with pytest.raises(UsageError, match="format 2 of another version"):
        snapshots.read(newer.parent)


def test_there_are_none_where_there_is_no_run(tmp_path: Path) -> None:
    assert snapshots.newest(tmp_path / "nowhere") == (None, [])
    folder = make(tmp_path, 7)
    snapshots.remove(folder)
    assert snapshots.folders(tmp_path) == []
