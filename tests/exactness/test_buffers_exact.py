"""Buffers of every kind and the weights are those of a plain loop, whatever the cluster, and after a checkpoint too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch_alone import tree_sum

from roundtable.worker.replica.buffers import stored_parts

sys.path.insert(0, str(Path(__file__).parent))
from train_buffers import EPOCHS, GLOBAL_BATCH, MICRO_BATCH, dataset, network

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

ROOT, SCRIPT = Path(__file__).parents[2], Path(__file__).with_name("train_buffers.py")


def plain_loop() -> dict[str, torch.Tensor]:
    """The trained model's tensors as in its file."""
    model, (x, y) = network(), dataset().tensors
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    means = {name for name, _ in model.named_buffers() if "running" in name or name == "mean_norm"}
    most = {"seen", "body.1.num_batches_tracked"}
    for _ in range(EPOCHS):
        for bx, by in zip(x.split(GLOBAL_BATCH), y.split(GLOBAL_BATCH), strict=True):
            start = {name: buffer.clone() for name, buffer in model.named_buffers() if name != "cache"}
            gradients: list[list[torch.Tensor]] = []
            left: dict[str, list[tuple[torch.Tensor, int]]] = {name: [] for name in start}
            for mx, my in zip(bx.split(MICRO_BATCH), by.split(MICRO_BATCH), strict=True):
                put(model, start)
                found = torch.autograd.grad(model(mx.clone(), my.clone()), list(model.parameters()))
                gradients.append([g * len(mx) for g in found])
                for name in start:
                    left[name].append((model.get_buffer(name).detach().clone(), len(mx)))
            for parameter, terms in zip(model.parameters(), zip(*gradients, strict=True), strict=True):
                parameter.grad = tree_sum(terms) / len(bx)
            optimizer.step()
            for name, values in left.items():
                if not any(differs(value, start[name]) for value, _ in values):
                    continue
                if name in means:
                    start[name] = tree_sum([value * samples for value, samples in values]) / len(bx)
                elif name == "tokens":
                    start[name] = start[name] + sum(value - start[name] for value, _ in values)
                elif name in most:
                    start[name] = torch.stack([value for value, _ in values]).amax(0)
                else:
                    start[name] = [value for value, _ in values if differs(value, start[name])][-1]
            put(model, start)
    return {f"{name}{end}": part for name, tensor in model.state_dict().items() for end, part in stored_parts(tensor)}


def put(model: torch.nn.Module, buffers: dict[str, torch.Tensor]) -> None:
    for name, value in buffers.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, value.clone())


def differs(a: torch.Tensor, b: torch.Tensor) -> bool:
    return not torch.equal(a.to_dense().to(torch.complex128), b.to_dense().to(torch.complex128))


@pytest.mark.parametrize(("workers", "servers", "transport"), [(1, 1, "auto"), (3, 2, "tcp"), (2, 9, "auto")])
def test_buffers_of_every_kind_have_the_bits_of_a_plain_loop(
    workers: int, servers: int, transport: str, launch: Any, tmp_path: Path
) -> None:
    expected = plain_loop()
    assert expected["tokens"].tolist() == (EPOCHS * dataset().tensors[1].bincount(minlength=3)).tolist()
    assert len(set(expected["place"].tolist() for _ in [0])) == 1 and expected["turns"].dtype == torch.float64
    launch("--workers", workers, "--servers", servers, "--transport", transport, SCRIPT)
    written = tmp_path / "exported.safetensors"
    subprocess.run(
        [sys.executable, ROOT / "launch.py", "checkpoint", "export", tmp_path / "run", "--out", written], check=True, timeout=120
    )
    for path in (tmp_path / "run" / "model.safetensors", written):
        found = load_file(path)
        assert found.keys() == expected.keys()
        assert [name for name, tensor in expected.items() if not torch.equal(bits(found[name]), bits(tensor))] == []


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
