"""Scripts that evaluate together and stop early get what a plain loop gets, which is written here without this library."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch_alone import take_gradients
from train_together import (
    EPOCHS,
    EVALUATED,
    GLOBAL_BATCH,
    MICRO_BATCH,
    OPTIMIZER,
    PATIENCE,
    classifier,
    dataset,
    measured,
)

from roundtable.common.runtime.failpoints import VARIABLE

SCRIPT = Path(__file__).with_name("train_together.py")
LAUNCH = Path(__file__).parents[2] / "launch.py"

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def evaluated(model: nn.Module) -> dict[str, float]:
    """Evaluate batch by batch; a batch's mean counts by its samples."""
    inputs, labels = dataset(2, 43).tensors
    batches = list(zip(inputs.split(EVALUATED), labels.split(EVALUATED), strict=True))
    with torch.no_grad():
        found = [{name: float(value) for name, value in measured(model)(batch).items()} for batch in batches]
    sizes = [len(labels) for _, labels in batches]
    return {name: math.fsum(one[name] * n for one, n in zip(found, sizes, strict=True)) / len(inputs) for name in found[0]}


def plain_loop() -> tuple[list[dict[str, Any]], list[float], dict[str, torch.Tensor]]:
    """Train with torch alone until the held-out loss has not improved for a while.

    Return the evaluations, the losses, and the best model.
    """
    model = classifier()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, **OPTIMIZER)
    inputs, labels = dataset(1, 64).tensors
    evaluations: list[dict[str, Any]] = []
    training: list[float] = []
    best, bad, best_model = float("inf"), 0, dict(model.state_dict())
    for _ in range(EPOCHS):
        losses = []
        for at in range(0, len(inputs), GLOBAL_BATCH):
            parts = [slice(at + k, at + k + MICRO_BATCH) for k in range(0, GLOBAL_BATCH, MICRO_BATCH)]
            each = [nn.functional.cross_entropy(model(inputs[p]), labels[p]) for p in parts]
            losses += [float(loss.detach()) for loss in each]
            take_gradients(parameters, ((loss, MICRO_BATCH) for loss in each))
            optimizer.step()
        training.append(sum(losses) / len(losses))
        evaluations.append(evaluated(model))
        now = evaluations[-1]["held_out_loss"]
        best, bad = (now, 0) if now < best else (best, bad + 1)
        if not bad:
            best_model = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if bad == PATIENCE:
            break
    return evaluations, training, best_model


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--workers", 1, "--servers", 1], ""),
        (["--workers", 2, "--servers", 2, "--transport", "tcp"], ""),
        (["--workers", 3, "--servers", 2], "worker-0:evaluating:12:kill"),
    ],
)
def test_evaluations_have_the_same_bits_on_any_cluster(
    flags: list[Any], fault: str, launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault:
        monkeypatch.setenv(VARIABLE, fault)
    summary = launch(*flags, "--threads", 1, SCRIPT, "--", tmp_path)
    evaluations, losses, best = plain_loop()
    assert PATIENCE < len(evaluations) < EPOCHS
    got = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("worker-*.json"))]
    assert sum(len(of_worker) == len(evaluations) for of_worker in got) >= flags[1] - bool(fault)
    chiefs = [one["chief"] for one in max(got, key=len)]
    for of_worker in got:  # one that comes late may find that the run has ended
        n = len(of_worker)
        assert [{name: one[name] for name in evaluations[0]} for one in of_worker] == evaluations[:n]
        assert [one["loss"] for one in of_worker] == pytest.approx(losses[:n], rel=1e-6)
        assert [one["chief"] for one in of_worker] == chiefs[:n]
    assert chiefs[0] == 0 and chiefs == sorted(chiefs)  # worker-1 is the chief once worker-0 is lost
    assert set(chiefs) <= {0, 1} if fault else set(chiefs) == {0}
    assert summary["rounds"] == 4 * len(evaluations) and summary["ended_early"]["reason"].startswith("no better than")
    assert summary["accuracy"] == evaluations[-1]["accuracy"]
    saved = load_file(tmp_path / "run" / "models" / "best.safetensors")
    assert {name: tensor.tolist() for name, tensor in saved.items()} == {name: tensor.tolist() for name, tensor in best.items()}
    assert summary["saved"]["best"]["round"] == 4 * (len(evaluations) - PATIENCE)
    assert summary["accuracy_of"] == f"43 held-out samples, after round {summary['rounds']}"


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        pytest.param("run.agree(object())", "train.py line 8: run.agree() takes None, numbers, strings", marks=pytest.mark.long),
        pytest.param(
            "run.save('model')",
            "train.py line 8: run.save() takes a name of letters, digits, - and _, other than 'model'",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "run.evaluate(lambda batch: 1.0, data)",
            "the function of run.evaluate() must return a dict of numbers",
            marks=pytest.mark.long,
        ),
        ("[run.agree(1) for _ in run.batches(data, epochs=1)]", "train.py line 8: run.agree() was called inside a loop"),
    ],
)
def test_a_wrong_use_gets_one_sentence(statement: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import torch, roundtable\n"
        "data = torch.utils.data.TensorDataset(torch.ones(8, 2), torch.zeros(8, dtype=torch.long))\n"
        "run = roundtable.join()\n"
        "model = run.replicate(torch.nn.Linear(2, 2))\n"
        "opt = run.optimizer(torch.optim.SGD, lr=0.1)\n"
        "for x, y in run.batches(data, epochs=1):\n"
        "    torch.nn.functional.cross_entropy(model(x), y).backward(); opt.step()\n"
        f"{statement}\n"
    )
    command = [sys.executable, LAUNCH, "local", "--run-dir", tmp_path / "run", "--workers", "1", "train.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    log = (tmp_path / "run" / "logs" / "worker-0.log").read_text()
    assert message in result.stderr + result.stdout + log, log[-2000:]
    assert "Traceback" not in result.stderr
