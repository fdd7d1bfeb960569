"""A tensor that is updated whole has the bits of torch's own step, however it is cut into chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from roundtable.common.config.settings import Settings
from roundtable.common.model.layout import Layout, make_layout
from roundtable.common.model.partial_sum import Sum, nothing
from roundtable.common.model.tensor_bytes import to_frame
from roundtable.common.policies import load
from roundtable.common.protocol.messages.setup import Update
from roundtable.common.protocol.model_spec import TensorSpec
from roundtable.common.storage import tensor_file
from roundtable.common.storage.tensor_file import TensorFiles
from roundtable.ps.params.dense import DenseParameters

SHAPE = (12, 20)
MUON = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "ns_coefficients": [3.4445, -4.775, 2.0315],
        "eps": 1e-7, "ns_steps": 5, "adjust_lr_fn": None}  # fmt: skip
ADAFACTOR = {
    "lr": 0.1,
    "beta2_decay": -0.8,
    "eps": [None, 1e-3],
    "d": 1.0,
    "weight_decay": 0.0,
    "foreach": None,
    "maximize": False,
}


def cut(frozen: bool = False, chunk_bytes: int = 400) -> Layout:
    with mock.patch("roundtable.common.model.layout.CHUNK_BYTES", chunk_bytes):
        return make_layout([TensorSpec("w", list(SHAPE), "float32", 0, frozen=frozen, whole=True)], 1)


def store(layout: Layout, name: str, settings: dict[str, Any]) -> DenseParameters:
    return DenseParameters(layout, 0, Update(name, [settings]), load(Settings()))


def apply(ours: DenseParameters, layout: Layout, gradient: torch.Tensor | None, **more: Any) -> torch.Tensor:
    """Apply a sum of gradients of 4 samples chunk by chunk, the last one first, and return the new weights."""
    into = {chunk.id: torch.full((chunk.numel,), torch.nan) for chunk in layout.chunks}
    for chunk in reversed(layout.chunks):
        part = nothing()
        if gradient is not None:
            part = Sum(gradient.reshape(-1)[chunk.pieces[0].start :][: chunk.numel] * 4, 1)
        assert ours.apply(chunk.id, [part], 4, {}, into=into[chunk.id], **more) is None
    return torch.cat([into[chunk.id] for chunk in layout.chunks]).view(SHAPE)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("name", "settings"), [("Muon", MUON), ("Adafactor", ADAFACTOR)])
def test_its_update_is_torchs_own_also_after_it_was_frozen_and_after_a_checkpoint(
    name: str, settings: dict[str, Any], frozen: bool, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(3)
    plain = torch.randn(SHAPE, generator=generator)
    gradients = [torch.randn(SHAPE, generator=generator) for _ in range(4)]
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    optimizer = getattr(torch.optim, name)([plain], **arguments)
    layout = cut(frozen)
    assert len(layout.chunks) == 3
    ours = store(layout, name, settings)
    for chunk in layout.chunks:
        ours.load(chunk.id, to_frame(plain.reshape(-1)[chunk.pieces[0].start :][: chunk.numel].clone()))
    for step, gradient in enumerate([None, *gradients]):
        if step == 3:
            tensor_file.write(tmp_path / "state", list(ours.state({})), {}, lambda size: None)
            ours = store(layout, name, settings)
            ours.restore(TensorFiles([tmp_path / "state"]))
        found = apply(ours, layout, gradient)
        if gradient is not None:
            plain.grad = gradient * 4 / 4
            optimizer.step()
        if gradient is not None or not frozen:
            assert torch.equal(found, plain), step


def test_the_clipping_factor_and_the_scale_of_the_rate_are_those_of_other_chunks() -> None:
    generator = torch.Generator().manual_seed(3)
    plain, gradient = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    layout = cut()
    ours = store(layout, "Adafactor", ADAFACTOR)
    for chunk in layout.chunks:
        ours.load(chunk.id, to_frame(plain.reshape(-1)[chunk.pieces[0].start :][: chunk.numel].clone()))
    found = apply(ours, layout, gradient, factor=torch.tensor(0.25), lr_scale=0.5)
    plain.grad = gradient * 0.25
    torch.optim.Adafactor([plain], lr=0.05).step()
    assert torch.equal(found, plain)
