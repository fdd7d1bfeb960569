"""A server's file of a checkpoint: written where the coordinator has asked for it, or a reason why not."""

from __future__ import annotations

import errno
import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import safe_open

from roundtable.common.protocol.messages.saving import CheckpointStatus
from roundtable.common.storage import checkpoint
from roundtable.common.storage.tensor_file import Entry
from roundtable.ps.shard.checkpoint_writer import CheckpointData, CheckpointWriter

CAPTURE = CheckpointData(7, "token", [Entry("weights/w", [2], [torch.tensor([1.0, 2.0])])], {"seen": 3})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = checkpoint.folder_of(tmp_path, 7)
    folder.mkdir(parents=True)
    (folder / checkpoint.TOKEN_FILE).write_text("token")
    return folder


def written(run_dir: Path) -> CheckpointStatus:
    writer = CheckpointWriter(1, run_dir)
    writer.start(CAPTURE)
    writer.wait(lambda: None)
    saved = writer.poll()
    assert saved is not None and writer.poll() is None
    return saved


def test_it_holds_the_state_and_what_is_not_tensors(folder: Path, tmp_path: Path) -> None:
    saved = written(tmp_path)
    path = folder / checkpoint.file_of(1)
    assert (saved.round, saved.state, saved.bytes) == (7, "written", path.stat().st_size)
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("weights/w").tolist() == [1.0, 2.0]
        assert json.loads(file.metadata()["extra"]) == {"seen": 3}


def test_a_folder_that_is_not_the_coordinator_s_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (folder / checkpoint.TOKEN_FILE).write_text("another")
    saved = written(tmp_path)
    assert saved.state == "failed" and "server-1 cannot see " in saved.reason
    assert not (folder / checkpoint.file_of(1)).exists()
    assert "cannot see" in written(tmp_path / "elsewhere").reason


def test_a_full_disk_is_told_and_raises_nothing(folder: Path, tmp_path: Path) -> None:
    with mock.patch("os.fsync", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
        saved = written(tmp_path)
    assert saved.state == "failed" and "No space left on device" in saved.reason


def test_one_that_is_wanted_meanwhile_is_written_next(folder: Path, tmp_path: Path) -> None:
    later = checkpoint.folder_of(tmp_path, 8)
    later.mkdir()
    (later / checkpoint.TOKEN_FILE).write_text("token")
    writer, may_end = CheckpointWriter(1, tmp_path), threading.Event()
    with mock.patch("os.fsync", side_effect=lambda fd: may_end.wait(10.0)):
        writer.start(CAPTURE)
        writer.start(replace(CAPTURE, round=8))
        assert writer.busy and writer.poll() is None
        writer.wait(may_end.set)  # called because it takes long
    saved = writer.poll()
    assert saved is not None and (saved.round, saved.state) == (8, "written") and not writer.busy
    sizes = [(f / checkpoint.file_of(1)).stat().st_size for f in (folder, later)]
    assert writer.bytes == sum(sizes)
