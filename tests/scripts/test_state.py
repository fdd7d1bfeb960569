"""A script that is resumed goes on with the epoch and the state that it had, as a plain loop that was never stopped."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch_alone import sha256, take_gradients
from train_state import EVALUATED, GLOBAL_BATCH, MICRO_BATCH, OPTIMIZER, STEPS, classifier, dataset

from roundtable.common.runtime.errors import UsageError
from roundtable.common.runtime.failpoints import VARIABLE
from roundtable.worker.together.script_state import ScriptState

SCRIPT = Path(__file__).with_name("train_state.py")
LAUNCH = Path(__file__).parents[2] / "launch.py"
EPOCHS = 6

pytestmark = pytest.mark.usefixtures("one_thread")


def plain_loop() -> tuple[dict[str, Any], list[list[Any]], str]:
    """Train with torch alone. Return the state at the end, what each epoch came to, and the hash of the weights."""
    model = classifier()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, **OPTIMIZER)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, **STEPS)
    inputs, labels = dataset(1, 64).tensors
    held_out, targets = dataset(2, 43).tensors
    losses, done = [], []
    for epoch in range(EPOCHS):
        for at in range(0, len(inputs), GLOBAL_BATCH):
            parts = [slice(at + k, at + k + MICRO_BATCH) for k in range(0, GLOBAL_BATCH, MICRO_BATCH)]
            take_gradients(parameters, ((nn.functional.cross_entropy(model(inputs[p]), labels[p]), MICRO_BATCH) for p in parts))
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            batches = list(zip(held_out.split(EVALUATED), targets.split(EVALUATED), strict=True))
            found = [float(nn.functional.cross_entropy(model(x), y)) * len(y) for x, y in batches]
        losses.append(math.fsum(found) / len(held_out))
        done.append([epoch, 4 * (epoch + 1), optimizer.param_groups[0]["lr"]])
    weights = model[0].weight.detach().double().sum()  # type: ignore[index,union-attr,operator]
    return {"losses": losses, "best": min(losses), "sum": float(weights)}, done, sha256(model)


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [pytest.param(10, id="in mid-epoch"), pytest.param(12, id="between two epochs")])
def test_a_resumed_script_begins_where_it_was(rounds: int, launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch("--workers", 2, "--servers", 2, "--threads", 1, "--rounds", rounds, SCRIPT, "--", EPOCHS, tmp_path)
    before = json.loads((tmp_path / "worker-0.json").read_text())["done"]
    assert [epoch for epoch, _, _ in before] == [0, 1, 2]
    for path in tmp_path.glob("worker-*.json"):
        path.unlink()
    resume = ["--resume", tmp_path / "run", "--workers", 3, "--servers", 1, "--threads", 1, "--rounds", 4 * EPOCHS]
    monkeypatch.setenv(VARIABLE, "worker-1:computing:14:kill")  # its replacement joins late
    command = [sys.executable, LAUNCH, "local", *resume, SCRIPT, "--", EPOCHS, tmp_path]
    result = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    state, done, sha256 = plain_loop()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["weights_sha256"] == sha256
    found = [json.loads(path.read_text()) for path in tmp_path.glob("worker-*.json")]
    assert [one["done"] for one in found].count(done[2:]) >= 2  # the epoch whose loop has the newest round is the first
    for one in found:
        assert {name: one[name] for name in state} == state
        rates = [(epoch, rate) for epoch, _, rate in one["done"]]  # a worker that comes late may pass a loop with newer weights
        assert rates == [(epoch, rate) for epoch, _, rate in done[-len(rates) :]]


@pytest.mark.slow
def test_an_epoch_with_two_loops_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import torch, roundtable\n"
        "data = torch.utils.data.TensorDataset(torch.ones(8, 2), torch.zeros(8, dtype=torch.long))\n"
        "run = roundtable.join()\n"
        "model = run.replicate(torch.nn.Linear(2, 2))\n"
        "opt = run.optimizer(torch.optim.SGD, lr=0.1)\n"
        "for epoch in run.epochs(2):\n"
        "    for _ in range(2):\n"
        "        for x, y in run.batches(data):\n"
        "            torch.nn.functional.cross_entropy(model(x), y).backward(); opt.step()\n"
    )
    command = [sys.executable, LAUNCH, "local", "--run-dir", tmp_path / "run", "--workers", "1", "train.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode and "Traceback" not in result.stderr
    assert "train.py line 6: run.epochs() needs one loop over run.batches() in each epoch, and epoch 0 had 2" in result.stderr


def test_a_state_is_kept_and_comes_back() -> None:
    kept: list[bytes] = []
    state = ScriptState(b"", kept.append)
    state["best"] = 0.5
    state.update(weights=torch.arange(6, dtype=torch.bfloat16).view(2, 3).t(), names=["a", None, {"b": True}])
    del state["best"]
    again = ScriptState(kept[-1], kept.append)
    assert len(kept) == 3 and list(again) == ["weights", "names"] and again["names"] == ["a", None, {"b": True}]
    assert torch.equal(again["weights"], state["weights"]) and again["weights"].dtype is torch.bfloat16
    with pytest.raises(KeyError):
        del again["best"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), r"^test_state\.py line \d+: run\.state keeps None, numbers, strings, bytes, tensors, .* \(not object\)\.$"),
        (torch.zeros(1 << 19), r"^test_state\.py line \d+: run\.state would have 2\.1 MB, and 1 MiB are the most"),
    ],
)
def test_a_value_that_cannot_be_kept_changes_nothing(value: Any, message: str) -> None:
    kept: list[bytes] = []
    state = ScriptState(b"", kept.append)
    state["best"] = 1
    with pytest.raises(UsageError, match=message):
        state["best"] = value
    assert dict(state) == {"best": 1} and len(kept) == 1
