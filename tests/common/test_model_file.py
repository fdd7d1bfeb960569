"""Files of weights: written here and read by plain safetensors, and whatever PyTorch has written."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage import tensor_file
from roundtable.common.storage.model_file import read_weights
from roundtable.common.storage.tensor_file import Entry, TensorFiles


def test_a_file_written_piece_by_piece_is_a_safetensors_file(tmp_path: Path) -> None:
    whole = torch.arange(12, dtype=torch.float32).view(3, 4)
    entries = [
        Entry("cut", [3, 4], [whole.view(-1)[:5], whole.view(-1)[5:]]),
        Entry("scalar", [], [torch.tensor(7)]),
        Entry("none", [0, 2], [torch.empty(0, 2, dtype=torch.bfloat16)]),
        Entry("made", [4], (torch.full((2,), n) for n in (1, 2)), torch.int64),
    ]
    path = tmp_path / "some.safetensors"
    digest, size = tensor_file.write(path, entries, {"format": "pt"})
    assert (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size) == (digest, size)
    found = load_file(path)
    assert torch.equal(found["cut"], whole) and found["scalar"].item() == 7 and found["none"].shape == (0, 2)
    assert found["made"].tolist() == [1, 1, 2, 2]


def test_tensors_of_several_files_are_found_by_name(tmp_path: Path) -> None:
    save_file({"optimizer/step/a.b/c": torch.tensor(3.0)}, tmp_path / "a")
    save_file({"optimizer/exp/a.b/c": torch.arange(6).view(3, 2)}, tmp_path / "b", {"key": "value"})
    files = TensorFiles([tmp_path / "a", tmp_path / "b"])
    assert sorted(files.below("optimizer", "a.b/c")) == ["exp", "step"]
    assert files.rows("optimizer/exp/a.b/c", 1, 3).tolist() == [[2, 3], [4, 5]]
    assert files.rows("optimizer/exp/a.b/c", 2, 2).shape == (0, 2)
    assert files.metadata == [{}, {"key": "value"}]


def test_state_dicts_are_read_however_pytorch_wrote_them(tmp_path: Path) -> None:
    state = {"w": torch.randn(3, 2), "steps": torch.tensor(4)}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pt")
    for name in ("a.safetensors", "b.pt"):
        found = read_weights(tmp_path / name)
        assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)


class Evil:
    """An object whose pickle does something when it is read."""

    def __reduce__(self) -> object:
        return Path.touch, (Path("evil"),)


def test_what_is_no_state_dict_is_refused_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Evil()}, "evil.pt")
    torch.save([torch.ones(2)], "list.pt")
    Path("text").write_text("not weights at all")
    Path("half.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    for name in ("evil.pt", "list.pt", "text", "half.safetensors", "missing"):
        with pytest.raises(UsageError, match=name):
            read_weights(Path(name))
    assert not Path("evil").exists()


@given(st.binary(max_size=64))
@example(b"junk")
@example(b"")
@example(b"\x80\x02.")
@example(b"PK\x03\x04")
def test_no_bytes_whatsoever_end_in_another_error(junk: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        file.write(junk)
        file.flush()
        with pytest.raises(UsageError, match=file.name):
            read_weights(Path(file.name))
