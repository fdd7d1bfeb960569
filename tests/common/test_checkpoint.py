"""Checkpoints as folders: a whole one is found, whatever lies beside it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from roundtable.common.protocol.messages.setup import Setup, Update
from roundtable.common.protocol.model_spec import TensorSpec
from roundtable.common.runtime.errors import UsageError
from roundtable.common.runtime.versions import Versions, versions_here
from roundtable.common.storage import checkpoint
from roundtable.common.storage.checkpoint import FileEntry, Manifest

SETUP = Setup([TensorSpec("w", [2], "float32", 0)], Update("SGD", [{"lr": 0.1}]))


def make(run_dir: Path, round_: int, content: bytes = b"content") -> Path:
    folder = checkpoint.folder_of(run_dir, round_)
    folder.mkdir(parents=True)
    (folder / checkpoint.TOKEN_FILE).write_text("token")
    (folder / checkpoint.file_of(0)).write_bytes(content)
    files = {checkpoint.file_of(0): FileEntry(hashlib.sha256(content).hexdigest(), len(content))}
    manifest = Manifest(run="r", round=round_, servers=1, setup=SETUP, settings={}, files=files, versions=versions_here())
    checkpoint.write_manifest(folder, manifest)
    return folder


def test_the_newest_is_used_and_its_manifest_is_what_was_written(tmp_path: Path) -> None:
    make(tmp_path, 5)
    make(tmp_path, 100_000_000)
    make(tmp_path, 99_999_999)
    found, problems = checkpoint.newest(tmp_path)
    assert found is not None and not problems
    assert (found.manifest.round, found.manifest.setup) == (100_000_000, SETUP)
    assert found.damage() == ""


@pytest.mark.parametrize("content", [b"contenT", b"conten", None])
def test_one_that_is_damaged_is_named_and_the_one_before_it_used(tmp_path: Path, content: bytes | None) -> None:
    make(tmp_path, 5)
    path = make(tmp_path, 6) / checkpoint.file_of(0)
    path.unlink() if content is None else path.write_bytes(content)
    found, problems = checkpoint.newest(tmp_path)
    assert found is not None and found.manifest.round == 5
    assert len(problems) == 1 and str(path) in problems[0]


def test_one_that_was_not_finished_is_none(tmp_path: Path) -> None:
    make(tmp_path, 5)
    (make(tmp_path, 6) / checkpoint.MANIFEST_FILE).unlink()
    found, problems = checkpoint.newest(tmp_path)
    assert found is not None and found.manifest.round == 5 and not problems


def test_a_manifest_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    broken = make(tmp_path, 5) / checkpoint.MANIFEST_FILE
    broken.write_bytes(broken.read_bytes()[:-20])
    found, problems = checkpoint.newest(tmp_path)
    assert found is None and len(problems) == 1 and str(broken) in problems[0]


def test_one_of_another_format_is_refused_and_not_passed_over_for_an_older_one(tmp_path: Path) -> None:
    make(tmp_path, 5)
    newer = make(tmp_path, 6) / checkpoint.MANIFEST_FILE
    newer.write_text(json.dumps({"format": 2, "versions": {"program": "9.9", "torch": "3.0"}, "unlike": "the first"}))
    here = f"this is {versions_here()}, which reads format 1:"
    for find in (lambda: checkpoint.read(newer.parent), lambda: checkpoint.newest(tmp_path)):
        with pytest.raises(UsageError, match=f"made by roundtable 9.9 with torch 3.0 in format 2, and {re.escape(here)}"):
            find()


@pytest.mark.parametrize("was", [Versions("9.9", versions_here().torch), Versions(versions_here().program, "1.0"), None])
def test_one_of_another_version_is_refused_unless_that_is_accepted(tmp_path: Path, was: Versions | None) -> None:
    path = make(tmp_path, 5) / checkpoint.MANIFEST_FILE
    assert checkpoint.check_versions(checkpoint.read(path.parent), accepted=False) == ""
    values = json.loads(path.read_text())
    if was is None:  # as it was written before versions were put down
        del values["versions"]
    else:
        values["versions"] = {"program": was.program, "torch": was.torch}
    path.write_text(json.dumps(values))
    found = checkpoint.read(path.parent)
    sentence = re.escape(f"was made by {was or 'roundtable unknown with torch unknown'}, and this is {versions_here()};")
    with pytest.raises(UsageError, match=f"{sentence}.*--allow-version-mismatch"):
        checkpoint.check_versions(found, accepted=False)
    assert re.search(sentence, checkpoint.check_versions(found, accepted=True))


def test_there_are_none_where_there_is_no_run(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "nowhere") == (None, [])
    folder = make(tmp_path, 7)
    checkpoint.remove(folder)
    assert checkpoint.folders(tmp_path) == []
