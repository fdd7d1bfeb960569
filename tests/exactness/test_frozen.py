"""Layers that are frozen, and unfrozen in mid-training, have the bits of a plain loop; all workers have the first one's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch_alone import take_gradients

sys.path.insert(0, str(Path(__file__).parent))
import train_edited
from train_frozen import EPOCHS, GLOBAL_BATCH, MICRO_BATCH, THAWS, dataset, network, trained

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SCRIPT = Path(__file__).with_name("train_frozen.py")
EDITED = Path(__file__).with_name("train_edited.py")


def plain_loop() -> dict[str, torch.Tensor]:
    model = network(0)
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)
    x, y = dataset().tensors
    for epoch in range(EPOCHS):
        model[2].requires_grad_(epoch >= THAWS)
        having = [p for p in parameters if p.requires_grad]
        for bx, by in zip(x.split(GLOBAL_BATCH), y.split(GLOBAL_BATCH), strict=True):
            parts = zip(bx.split(MICRO_BATCH), by.split(MICRO_BATCH), strict=True)
            take_gradients(having, ((nn.functional.mse_loss(model(mx.clone()), my.clone()), len(mx)) for mx, my in parts))
            optimizer.step()
    return dict(model.state_dict())


@pytest.mark.parametrize(
    ("workers", "servers", "transport", "loops"), [(1, 1, "auto", "one-loop"), (3, 2, "auto", "loops"), (2, 3, "tcp", "one-loop")]
)
def test_frozen_and_unfrozen_layers_have_the_bits_of_a_plain_loop(
    workers: int, servers: int, transport: str, loops: str, launch: Any, tmp_path: Path
) -> None:
    launch("--workers", workers, "--servers", servers, "--transport", transport, SCRIPT, "--", loops)
    found, expected = load_file(tmp_path / "run" / "model.safetensors"), plain_loop()
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []
    assert not torch.equal(found["2.weight"], network(0)[2].weight)


@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_what_is_written_before_the_first_batch_makes_the_first_weights(transport: str, launch: Any, tmp_path: Path) -> None:
    """And values that are put back are no change."""
    launch("--workers", 2, "--servers", 2, "--transport", transport, EDITED, "--", "stays")
    found, expected = load_file(tmp_path / "run" / "model.safetensors"), train_edited.network(5).state_dict()
    nn.init.constant_(expected["0.bias"], 0.25)
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []


def test_a_frozen_layer_that_is_moved_fails_the_run_by_name(launch: Any) -> None:
    with pytest.raises(AssertionError, match=r"error: .*the script has changed '2\.weight' in round"):
        launch("--workers", 2, EDITED, "--", "moves")
