"""Rates that a script sets, by schedulers or by hand, are those of a plain loop, which is written here without this library."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch_alone import sha256, take_gradients
from train_scheduled import EPOCHS, GLOBAL_BATCH, MICRO_BATCH, OPTIMIZER, ROUNDS, Rates, classifier, dataset, is_marked

from roundtable.common.runtime.failpoints import VARIABLE

SCRIPT = Path(__file__).with_name("train_scheduled.py")
LAUNCH = Path(__file__).parents[2] / "launch.py"

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def plain_loop(kind: str) -> nn.Module:
    """Train with torch alone, two micro-batches a step."""
    model = classifier()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, **OPTIMIZER)
    rates = Rates(optimizer, kind)
    inputs, labels = dataset().tensors
    for round_ in range(EPOCHS * ROUNDS):
        at = round_ % ROUNDS * GLOBAL_BATCH
        parts = [slice(k, k + MICRO_BATCH) for k in (at, at + MICRO_BATCH)]
        take_gradients(parameters, ((nn.functional.cross_entropy(model(inputs[p]), labels[p]), MICRO_BATCH) for p in parts))
        rates.before_step(round_)
        if kind != "scaled" or not is_marked(inputs[parts[1]]):
            optimizer.step()
        rates.after_step()
        if round_ % ROUNDS == ROUNDS - 1:
            rates.after_epoch(model)
    return model


@pytest.mark.parametrize(
    ("kind", "flags", "fault"),
    [
        ("cycle", ["--workers", 1, "--servers", 1], ""),
        ("epochs", ["--workers", 2, "--servers", 2, "--transport", "tcp"], ""),
        # a round has two micro-batches, so one of three workers computes some rounds only; another one joins late
        ("warmup", ["--workers", 3, "--servers", 2], "worker-1:computing:5:kill"),
        ("plateau", ["--workers", 3, "--servers", 2], "worker-0:computing:7:kill"),
        ("hand", ["--workers", 3, "--servers", 1], "worker-0:computing:8:kill"),
        pytest.param("plateau", ["--workers", 3, "--replicas", 1], "server-0:applying:6:kill", marks=pytest.mark.long),
    ],
)
def test_a_rate_counts_once_a_round_whoever_computes_it(
    kind: str, flags: list[Any], fault: str, launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault:
        monkeypatch.setenv(VARIABLE, fault)
    summary = launch(*flags, "--threads", 1, SCRIPT, "--", kind)
    assert (summary["rounds"], summary["dropped"]) == (EPOCHS * ROUNDS, 0)
    assert summary["weights_sha256"] == sha256(plain_loop(kind))


def test_a_step_that_a_grad_scaler_finds_not_finite_drops_the_round_on_all_workers(launch) -> None:
    summary = launch("--workers", 2, "--servers", 2, "--threads", 1, "--on-nonfinite", "skip", SCRIPT, "--", "scaled")
    assert (summary["rounds"], summary["dropped"]) == (EPOCHS * ROUNDS, 2 * EPOCHS)
    assert summary["weights_sha256"] == sha256(plain_loop("scaled"))


@pytest.mark.long
def test_a_worker_that_trains_apart_has_the_rates_of_a_plain_loop(launch, tmp_path: Path) -> None:
    launch("--workers", 1, "--policy", "average", "--threads", 1, SCRIPT, "--", "warmup")
    model = load_file(tmp_path / "run" / "model.safetensors")
    for name, tensor in plain_loop("warmup").state_dict().items():  # the merge of one replica rounds
        torch.testing.assert_close(model[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "rounds"),
    [("plateau", 5), pytest.param("warmup", 1, marks=pytest.mark.long), pytest.param("epochs", 6, marks=pytest.mark.long)],
)
def test_a_run_that_goes_on_has_the_rates_of_one_that_never_stopped(kind: str, rounds: int, launch, tmp_path: Path) -> None:
    launch("--workers", 1, "--servers", 2, "--threads", 1, "--rounds", rounds, SCRIPT, "--", kind)
    command = [sys.executable, LAUNCH, "local", "--resume", tmp_path / "run", "--workers", "2", "--rounds", "1000"]
    result = subprocess.run([*command, SCRIPT, "--", kind], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rounds"] == EPOCHS * ROUNDS and summary["weights_sha256"] == sha256(plain_loop(kind))


@pytest.mark.long
def test_a_worker_watches_a_batch_if_the_checkpoint_is_of_a_round_whose_only_batch_had_not_been_watched(
    launch, tmp_path: Path
) -> None:
    flags = ["--workers", 1, "--servers", 1, "--threads", 1]
    whole = launch(*flags, SCRIPT, "--", "warmup", GLOBAL_BATCH, name="whole")
    launch(*flags, "--rounds", 1, SCRIPT, "--", "warmup", GLOBAL_BATCH)
    command = [sys.executable, LAUNCH, "local", "--resume", tmp_path / "run", "--rounds", "1000", SCRIPT, "--", "warmup"]
    subprocess.run([*command, str(GLOBAL_BATCH)], cwd=tmp_path, check=True, timeout=120)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["rounds"], summary["weights_sha256"]) == (EPOCHS * ROUNDS, whole["weights_sha256"])


def test_workers_that_set_different_rates_end_the_run_with_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, LAUNCH, "local", "--run-dir", tmp_path / "run", "--workers", "2", SCRIPT, "--", "apart"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert re.search(
        r"(worker-\d) and (worker-\d) have set different values for round \d: lr of parameter group 0 is ", result.stderr
    )
    assert re.search(r"is (0.5 on worker-0 and 1.5 on worker-1|1.5 on worker-1 and 0.5 on worker-0)\. ", result.stderr)
