"""A script's average of the weights is, on every worker, that of a plain loop, which is written here without this library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch_alone import take_gradients
from train_early import GLOBAL_BATCH, MICRO_BATCH, OPTIMIZER, classifier, dataset
from train_ema import ROUNDS, averaged, lr_of

from roundtable.common.runtime.failpoints import VARIABLE

SCRIPT = Path(__file__).with_name("train_ema.py")
LAUNCH = Path(__file__).parents[2] / "launch.py"

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def plain_loop() -> dict[str, torch.Tensor]:
    """Train with torch alone, with four micro-batches a round that are added along the tree. Return the averaged weights."""
    model = classifier()
    ema = averaged(model)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, **OPTIMIZER)
    inputs, labels = dataset().tensors
    for round_ in range(ROUNDS):
        at = round_ * GLOBAL_BATCH % len(inputs)
        parts = [slice(at + k, at + k + MICRO_BATCH) for k in range(0, GLOBAL_BATCH, MICRO_BATCH)]
        take_gradients(parameters, ((nn.functional.cross_entropy(model(inputs[p]), labels[p]), MICRO_BATCH) for p in parts))
        optimizer.step()
        ema.update_parameters(model)
        optimizer.param_groups[0]["lr"] = lr_of(round_ + 1)
    return ema.module.state_dict()


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--workers", 1, "--servers", 1], ""),
        (["--workers", 2, "--servers", 2, "--transport", "tcp"], ""),
        (["--workers", 3, "--servers", 2], "worker-2:computing:5:kill"),
    ],
)
def test_every_worker_that_was_there_from_the_start_has_the_average_of_a_plain_loop(
    flags: list[Any], fault: str, launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault:
        monkeypatch.setenv(VARIABLE, fault)
    assert launch(*flags, "--threads", 1, SCRIPT, "--", tmp_path)["rounds"] == ROUNDS
    found = {path.stem: torch.load(path, weights_only=True) for path in tmp_path.glob("worker-*.pt")}
    late = {name for name, one in found.items() if one["rounds"] != list(range(1, ROUNDS + 1))}
    assert len(found) - len(late) == flags[1] - bool(fault) and len(late) <= bool(fault)  # one takes the place of the killed one
    for name in found.keys() - late:
        assert found[name]["updates"] == ROUNDS
        assert {key: tensor.tolist() for key, tensor in found[name]["ema"].items()} == {
            key: tensor.tolist() for key, tensor in plain_loop().items()
        }
    for name in late:
        rounds = found[name]["rounds"]
        assert rounds == list(range(ROUNDS + 1 - len(rounds), ROUNDS + 1))


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("torch.nn.init.zeros_(model.weight)", "wrong() of run.on_round() has changed 'weight' in round 1: servers hold"),
        ("run.agree(1)", "train.py line 7: run.agree() was called in a function of run.on_round(), which a worker that is far"),
        ("opt.step()", "opt.step() was called without a batch"),
    ],
)
def test_a_wrong_use_gets_one_sentence(statement: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import torch, roundtable\n"
        "run = roundtable.join()\n"
        "model = run.replicate(torch.nn.Linear(2, 2))\n"
        "opt = run.optimizer(torch.optim.SGD, lr=0.1)\n"
        "@run.on_round\n"
        "def wrong():\n"
        f"    {statement}\n"
        "data = torch.utils.data.TensorDataset(torch.ones(8, 2), torch.zeros(8, dtype=torch.long))\n"
        "for x, y in run.batches(data, global_batch=2, micro_batch=2, epochs=1):\n"
        "    torch.nn.functional.cross_entropy(model(x), y).backward(); opt.step()\n"
    )
    command = [sys.executable, LAUNCH, "local", "--run-dir", tmp_path / "run", "--workers", "1", "train.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    log = (tmp_path / "run" / "logs" / "worker-0.log").read_text()
    assert message in result.stderr + result.stdout + log, log[-2000:]
    assert result.returncode == 2 and "Traceback" not in result.stderr
