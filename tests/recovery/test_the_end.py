"""The model that is handed over is the one that was trained, whatever scripts do before and after the last round."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import LAUNCH, SCRIPTS
from benchmarks.faults.measuring import measure
from benchmarks.faults.rows import rows
from benchmarks.live import LENGTH, Cluster
from roundtable.common.storage.run_files import MODEL_FILE

Start = Callable[..., Cluster]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
ENDS = str(SCRIPTS / "train_to_the_end.py")
#: A script with batch normalisation, whose running statistics are computed anew, that saves what it should find in the file.
RECOMPUTES = """
import torch, roundtable
g = torch.Generator().manual_seed(3)
data = torch.utils.data.TensorDataset(torch.randn(256, 16, generator=g), torch.randint(2, (256,), generator=g))
run = roundtable.join()
model = run.replicate(torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2)))
opt = run.optimizer(torch.optim.SGD, lr=0.05)
for x, y in run.batches(data, micro_batch=16, global_batch=64, epochs=2):
    torch.nn.functional.cross_entropy(model(x), y).backward()
    opt.step()
run.recompute_batchnorm(data)
if run.is_chief:
    torch.save(model.state_dict(), "expected.pt")
    model[0].bias.data += 0.0
    with torch.no_grad():
        model[2].bias.zero_()
"""
#: One that breaks off, if it is told to.
BREAKS = """
import sys, torch, roundtable
g = torch.Generator().manual_seed(3)
data = torch.utils.data.TensorDataset(torch.randn(256, 16, generator=g), torch.randint(2, (256,), generator=g))
run = roundtable.join()
model = run.replicate(torch.nn.Linear(16, 2))
opt = run.optimizer(torch.optim.SGD, lr=0.05)
for number, (x, y) in enumerate(run.batches(data, micro_batch=16, global_batch=64, epochs=3)):
    torch.nn.functional.cross_entropy(model(x), y).backward()
    opt.step()
    if sys.argv[1:] == ["break"] and number == 9:
        break
"""


@pytest.mark.parametrize(
    "name",
    [pytest.param("the first worker's script ends early", marks=pytest.mark.long), "a server killed while a worker evaluates"],
)
def test_a_run_to_whose_end_that_happens_ends_as_if_nothing_had_happened(undisturbed: str, tmp_path: Path, name: str) -> None:
    outcome = measure(rows(1.0, tmp_path)[name], undisturbed, tmp_path / "run")
    assert (outcome.problem, outcome.same, outcome.exact) == ("", True, True)


def test_the_summary_says_who_left_early(cluster: Start, undisturbed: str) -> None:
    summary = cluster(*LENGTH, ENDS, "leave").summary()
    assert summary["weights_sha256"] == undisturbed and summary["left_early"].keys() == {"worker-1"}
    assert 60 <= summary["left_early"]["worker-1"] < summary["rounds"]


def test_who_evaluates_for_longer_than_the_timeout_is_waited_for_and_the_model_is_there_before(
    cluster: Start, undisturbed: str
) -> None:
    run = cluster(*LENGTH, "--progress-timeout", 3, ENDS, "evaluate")
    run.until(lambda: run.events("model"), "the model was written")
    written_at = time.monotonic()
    assert (run.folder / MODEL_FILE).exists() and not (run.folder / "summary.json").exists()
    code, _ = run.end()
    assert time.monotonic() > written_at + 5.0
    summary = run.summary()
    assert code == 0 and (summary["weights_sha256"], summary["accuracy"]) == (undisturbed, 0.5)
    assert not run.events("left")[-1].data.get("failed") and "failed_after_the_last_round" not in summary


@pytest.mark.parametrize(("how", "why"), [("raise", "ValueError: the evaluation failed"), ("kill", "exited")])
@pytest.mark.parametrize("policy", ["sync", "local"])
def test_a_worker_that_fails_after_the_last_round_changes_nothing(cluster: Start, how: str, why: str, policy: str) -> None:
    run = cluster("--epochs", 3, "--policy", policy, "--max-restarts", 0, ENDS, how)
    summary = run.summary()
    assert why in summary["failed_after_the_last_round"]["worker-0"]
    assert load_file(run.folder / MODEL_FILE) and not run.events("restarted")


@pytest.mark.parametrize("policy", ["local", "average"])
def test_the_file_has_the_statistics_that_were_computed_anew_and_nothing_is_dropped_in_silence(
    cluster: Start, tmp_path: Path, policy: str
) -> None:
    (tmp_path / "script.py").write_text(RECOMPUTES)
    run = cluster("--policy", policy, "script.py")
    run.summary()
    expected, found = torch.load(tmp_path / "expected.pt"), load_file(run.folder / MODEL_FILE)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], value) for name, value in expected.items())
    assert [event.data["text"].partition(":")[0] for event in run.events("warning")] == [
        "the script of worker-0 has changed 2.bias after the last round"
    ]


def test_a_script_that_breaks_off_alone_says_why_the_run_is_not_finished(tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text(BREAKS)
    path = {"PYTHONPATH": str(LAUNCH.parent)}
    for how, code in (("break", 1), ("all", 0)):
        ended = subprocess.run(
            [sys.executable, "alone.py", how], cwd=tmp_path, env={**os.environ, **path}, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert ended.returncode == code, ended.stderr
        told = "all scripts left the training loop after 2 of 12 rounds: let run.batches() finish"
        assert (told in ended.stderr) == (code == 1) and "Traceback" not in ended.stderr
    assert [path.name for path in tmp_path.glob("runs/*/model.safetensors")] == ["model.safetensors"]
