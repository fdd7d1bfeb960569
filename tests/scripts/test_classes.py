"""Optimizers that update whole tensors, and groups with classes of their own, train as in a plain loop of torch alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch_alone import sha256, take_gradients
from train_optimizer_classes import GLOBAL_BATCH, MICRO_BATCH, ROUNDS, dataset, groups, network

from roundtable.common.runtime.failpoints import VARIABLE

SCRIPT = Path(__file__).with_name("train_optimizer_classes.py")
LAUNCH = Path(__file__).parents[2] / "launch.py"

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def plain_loop(whose: str) -> nn.Module:
    """Train with torch alone, an optimizer for each group, and two micro-batches a step."""
    model = network()
    parameters = list(model.parameters())
    optimizers = []
    for group in groups(model, whose):
        cls = group.pop("optimizer", torch.optim.AdamW)
        optimizers.append(cls([group], **({} if "lr" in group else {"lr": 0.01})))
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5) for optimizer in optimizers]
    inputs, labels = dataset().tensors
    for at in range(0, len(inputs), GLOBAL_BATCH):
        parts = [slice(k, k + MICRO_BATCH) for k in (at, at + MICRO_BATCH)]
        take_gradients(parameters, ((nn.functional.cross_entropy(model(inputs[p]), labels[p]), MICRO_BATCH) for p in parts))
        for step in (*(optimizer.step for optimizer in optimizers), *(scheduler.step for scheduler in schedulers)):
            step()
    return model


@pytest.mark.parametrize(
    ("whose", "flags", "fault"),
    [
        ("own", ["--workers", 1, "--servers", 1], ""),
        ("torch", ["--workers", 2, "--servers", 3, "--transport", "tcp"], ""),
        ("torch", ["--workers", 3, "--servers", 2], "worker-1:computing:3:kill"),
        pytest.param("own", ["--workers", 2, "--replicas", 1], "server-1:applying:3:kill", marks=pytest.mark.long),
        pytest.param("torch", ["--workers", 2, "--servers", 2], "server-0:applying:3:kill", marks=pytest.mark.long),
    ],
)
def test_each_group_is_updated_by_its_own_class(
    whose: str, flags: list[Any], fault: str, launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault:
        monkeypatch.setenv(VARIABLE, fault)
    summary = launch(*flags, "--threads", 1, SCRIPT, "--", whose)
    assert (summary["rounds"], summary["dropped"]) == (ROUNDS, 0)
    assert summary["weights_sha256"] == sha256(plain_loop(whose))


@pytest.mark.parametrize("whose", ["own", pytest.param("torch", marks=pytest.mark.long)])
def test_a_run_goes_on_with_the_state_of_whole_tensors_on_another_number_of_servers(whose: str, launch, tmp_path: Path) -> None:
    launch("--workers", 1, "--servers", 1, "--threads", 1, "--rounds", 3, SCRIPT, "--", whose)
    command = [sys.executable, LAUNCH, "local", "--resume", tmp_path / "run", "--servers", "2", "--rounds", "1000"]
    result = subprocess.run([*command, SCRIPT, "--", whose], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rounds"] == ROUNDS and summary["weights_sha256"] == sha256(plain_loop(whose))
