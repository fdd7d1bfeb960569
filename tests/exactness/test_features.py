"""All features of models, data sets and loops at once give the bits of a plain loop, on clusters and alone."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from roundtable.common.config.batch_plan import derive_seed
from roundtable.common.storage.event_log import RunLogReader

sys.path.insert(0, str(Path(__file__).parent))
from train_features import EPOCHS, GLOBAL_BATCH, MICRO_BATCH, SAMPLES, Images, Net, collate, groups

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SCRIPT = Path(__file__).with_name("train_features.py")
ROUNDS = EPOCHS * 3
Terms = list[dict[int, torch.Tensor]]


def seed(*place: Any) -> None:
    number = derive_seed(0, *place)
    torch.manual_seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    random.seed(number)


def tree_sum(terms: Terms) -> dict[int, torch.Tensor]:
    """Neighbours in pairs, level by level; what only one of two has is kept."""
    while len(terms) > 1:
        for a, b in zip(terms[::2], terms[1::2], strict=False):
            a.update({i: a[i] + value if i in a else value for i, value in b.items()})
        terms = terms[::2]
    return terms[0]


def plain_loop(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Train in this process with torch alone, stepping on masters in single precision."""
    data = Images()
    torch.manual_seed(3)
    model = Net().to(dtype)
    parameters = list(model.parameters())
    masters = Net().float()
    masters.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(groups(masters), lr=1e-2 if dtype == torch.float32 else 2e-5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    moving = {i: b for i, b in enumerate(model.buffers()) if b.is_floating_point()}
    means = {i: b.float() for i, b in moving.items()}
    round_ = 0
    for epoch in range(EPOCHS):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(derive_seed(0, "order", epoch))).tolist()
        for batch in (order[i : i + GLOBAL_BATCH] for i in range(0, SAMPLES, GLOBAL_BATCH)):
            gradients: Terms = []
            buffers: Terms = []
            start = {i: b.clone() for i, b in moving.items()}
            for k, part in enumerate(batch[i : i + MICRO_BATCH] for i in range(0, len(batch), MICRO_BATCH)):
                samples = []
                for index in part:
                    seed("sample", epoch, index)
                    samples.append(data[index])
                x, y = collate(samples)
                for i, buffer in moving.items():
                    buffer.copy_(start[i])
                seed("micro-batch", round_, k)
                model.zero_grad()
                nn.functional.cross_entropy(model(x.to(dtype), branch=round_ % 2 == 1).float(), y).backward()
                gradients.append({i: p.grad.float() * len(part) for i, p in enumerate(parameters) if p.grad is not None})
                buffers.append({i: b.float() * len(part) for i, b in moving.items()})
            total, means = tree_sum(gradients), {i: b / len(batch) for i, b in tree_sum(buffers).items()}
            for i, parameter in enumerate(masters.parameters()):
                parameter.grad = total[i] / len(batch) if i in total else None
            optimizer.step()
            scheduler.step()
            with torch.no_grad():
                for parameter, master in zip(parameters, masters.parameters(), strict=True):
                    parameter.copy_(master)
                for i, buffer in moving.items():
                    buffer.copy_(means[i])
            round_ += 1
    return {name: t for name, t in model.state_dict().items() if "tracked" not in name}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def test_everything_at_once_gives_the_bits_of_a_plain_loop_on_any_cluster_and_alone(launch: Any, tmp_path: Path) -> None:
    expected = plain_loop(torch.float32)
    assert not torch.equal(expected["unused"], expected["scale"]) and expected["features.1.running_mean"].any()

    one = launch("--workers", 1, "--servers", 1, SCRIPT, "--", "float32", name="one")
    assert_equal(load_file(tmp_path / "one" / "model.safetensors"), expected)
    (tmp_path / "saved.pt").unlink()
    many = launch("--workers", 3, "--servers", 2, SCRIPT, "--", "float32", "--loaders", 2, "--calls", EPOCHS, name="many")
    assert_equal(load_file(tmp_path / "many" / "model.safetensors"), expected)
    assert_equal(torch.load(tmp_path / "saved.pt"), expected)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("ROUNDTABLE_COORDINATOR", None)
    subprocess.run(
        [sys.executable, SCRIPT, "float32"], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=120
    )
    alone = json.loads((tmp_path / "runs" / "train_features" / "summary.json").read_text())
    assert one["weights_sha256"] == many["weights_sha256"] == alone["weights_sha256"]

    log = RunLogReader(tmp_path / "many" / "events.sqlite")
    assert [row.samples for row in log.rounds()] == [18, 18, 14] * EPOCHS
    assert all(row.metrics["half"] == 0.5 and row.metrics["loss"] > 0 for row in log.rounds())
    assert len(log.metrics("accuracy")) >= 5 * ROUNDS - EPOCHS and len(log.metrics("ended")) == 1


def test_a_bfloat16_model_is_trained_on_masters_in_single_precision(launch: Any, tmp_path: Path) -> None:
    expected = plain_loop(torch.bfloat16)
    launch("--workers", 2, "--servers", 2, SCRIPT, "--", "bfloat16")
    assert_equal(load_file(tmp_path / "run" / "model.safetensors"), expected)
