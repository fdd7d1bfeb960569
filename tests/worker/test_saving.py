"""The model's file, made and written in parts, is one that safetensors reads."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from common.errors import WireError
from common.layout import CHUNK_BYTES
from common.messages import ModelPart
from common.runfiles import MODEL_FILE
from common.tensors import to_frame
from ps.archive import ModelFile
from worker.saving import model_parts


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(1200, 1500), nn.BatchNorm1d(1500), nn.Linear(1500, 3, dtype=torch.bfloat16), nn.Linear(3, 3))
    model[3].weight = nn.Parameter(torch.randn(3, 3).t())
    model.again = model[0]  # type: ignore[assignment]
    model.register_buffer("mask", torch.tensor([True, False]))
    model.register_buffer("nothing", torch.empty(0, 4))
    model.register_buffer("precise", torch.tensor(1.5, dtype=torch.float64))
    return model


def test_parts_in_any_order_and_twice_make_a_file_that_safetensors_reads(tmp_path: Path) -> None:
    model, file = network(), ModelFile(tmp_path)
    parts = sorted(model_parts(model), key=lambda part: part[0].part)
    sha256 = hashlib.sha256(b"".join(bytes(to_frame(p.detach().contiguous())) for _, p in sorted(model.named_parameters())))
    assert len(parts) > 3 and all(len(frame) == CHUNK_BYTES for _, (frame,) in parts[:-1])
    twice = parts * 2
    random.Random(3).shuffle(twice)
    for number, (body, frames) in enumerate(twice):
        assert not file.complete or number >= len(parts)
        file.add(body, frames)
    assert file.complete and not (tmp_path / MODEL_FILE).exists()
    file.finish()
    read = load_file(tmp_path / MODEL_FILE)
    assert read.keys() == model.state_dict().keys()
    assert all(
        torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in model.state_dict().items()
    )
    with safe_open(tmp_path / MODEL_FILE, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "weights_sha256": file.weights_sha256 or ""}
    assert file.weights_sha256 == sha256.hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == [MODEL_FILE]


def test_a_file_has_pairs_for_a_dtype_without_a_name_and_the_parts_of_a_sparse_buffer(tmp_path: Path) -> None:
    model, file = nn.Linear(2, 2), ModelFile(tmp_path)
    model.register_buffer("turns", torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex128))
    model.register_buffer("adjacency", torch.tensor([[0.0, 5.0], [0.0, 0.0]]).to_sparse())
    for body, frames in model_parts(model):
        file.add(body, frames)
    file.finish()
    read = load_file(tmp_path / MODEL_FILE)
    assert read["turns"].tolist() == [[1.0, 2.0], [3.0, -4.0]] and read["turns"].dtype == torch.float64
    assert read["adjacency.indices"].tolist() == [[0], [1]] and read["adjacency.values"].tolist() == [5.0]
    assert torch.equal(read["weight"], model.weight)


@pytest.mark.parametrize(
    ("part", "frames"),
    [
        (ModelPart(0, 2, ""), [b"short"]),
        (ModelPart(2, 2, ""), [b"x"]),
        (ModelPart(-1, 2, ""), [bytes(CHUNK_BYTES)]),
        (ModelPart(1, 2, ""), [b""]),
        (ModelPart(1, 2, ""), []),
        (ModelPart(1, 2, ""), [b"x", b"y"]),
        (ModelPart(0, 1, ""), [bytes(CHUNK_BYTES + 1)]),
    ],
)
def test_parts_that_are_not_what_they_say_are_refused(part: ModelPart, frames: list[bytes], tmp_path: Path) -> None:
    file = ModelFile(tmp_path)
    with pytest.raises(WireError):
        file.add(part, frames)
    assert not file.complete and not list(tmp_path.iterdir())
