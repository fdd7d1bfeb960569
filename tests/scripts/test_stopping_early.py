"""A script that stops early ends with the model that a plain loop has after as many rounds."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch_alone import sha256, take_gradients
from train_early import GLOBAL_BATCH, MICRO_BATCH, OPTIMIZER, classifier, dataset

from roundtable.common.runtime.failpoints import VARIABLE
from roundtable.common.storage.checkpoint import finished, round_of
from roundtable.common.storage.event_log import FILE_NAME, RunLogReader

SCRIPT = Path(__file__).with_name("train_early.py")
LAUNCH = Path(__file__).parents[2] / "launch.py"

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def plain_loop(rounds: int) -> nn.Module:
    """Train with torch alone, with four micro-batches a round that are added along the tree."""
    model = classifier()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, **OPTIMIZER)
    inputs, labels = dataset().tensors
    for round_ in range(rounds):
        at = round_ * GLOBAL_BATCH % len(inputs)
        parts = [slice(at + k, at + k + MICRO_BATCH) for k in range(0, GLOBAL_BATCH, MICRO_BATCH)]
        take_gradients(parameters, ((nn.functional.cross_entropy(model(inputs[p]), labels[p]), MICRO_BATCH) for p in parts))
        optimizer.step()
    return model


@pytest.mark.parametrize(
    ("flags", "who", "fault"),
    [
        (["--workers", 1, "--servers", 1], "all", ""),
        (["--workers", 2, "--servers", 2, "--transport", "tcp"], "all", ""),
        (["--workers", 3, "--servers", 2], "1", "worker-2:computing:5:kill"),
    ],
)
def test_the_model_is_that_of_the_last_round_on_any_cluster(
    flags: list[Any], who: str, fault: str, launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault:
        monkeypatch.setenv(VARIABLE, fault)
    summary = launch(*flags, "--threads", 1, SCRIPT, "--", who, 7)
    rounds = summary["rounds"]
    assert rounds == 7 if who == "all" else 7 <= rounds < 24
    assert summary["weights_sha256"] == sha256(plain_loop(rounds))
    ended = summary["ended_early"]
    assert (ended["round"], ended["reason"]) == (rounds, "it is good enough")
    assert who == "all" or ended["worker"] == f"worker-{who}"
    run = tmp_path / "run"
    assert summary["weights_sha256"] == sha256(plain_loop(rounds)) and round_of(finished(run)[-1]) == rounds
    assert {name: t.tolist() for name, t in load_file(run / "model.safetensors").items()} == {
        name: t.tolist() for name, t in plain_loop(rounds).state_dict().items()
    }
    with contextlib.closing(RunLogReader(run / FILE_NAME)) as log:
        assert [row.samples for row in log.rounds()] == [GLOBAL_BATCH] * rounds
        assert [event.data["round"] for _, _, event in log.events() if event.kind == "ends"] == [rounds]


def test_alone_it_ends_with_exit_code_0_and_says_so(tmp_path: Path) -> None:
    command = [sys.executable, LAUNCH, "local", "--run-dir", tmp_path / "run", "--workers", "1", SCRIPT, "--", "0", "3"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "ended early after round 3, as worker-0 asked: it is good enough" in result.stdout
