"""Real runs whose servers are killed, or that end in the middle and go on: the weights are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import LAUNCH
from benchmarks.live import TRAINING, ByHand, Cluster
from roundtable.cluster.process.children import Processes
from roundtable.common.runtime.failpoints import VARIABLE
from roundtable.common.runtime.versions import versions_here
from roundtable.common.storage import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

Start = Callable[..., Cluster]
SCRIPT = """
import torch, roundtable
run = roundtable.join()
model = run.replicate(torch.nn.Sequential(torch.nn.Linear(4, WIDTH), torch.nn.Linear(WIDTH, 2)))
opt = run.optimizer(torch.optim.SGD, lr=0.1)
data = torch.utils.data.TensorDataset(torch.ones(64, 4), torch.zeros(64, dtype=torch.long))
for x, y in run.batches(data, epochs=run.settings.epochs):
    opt.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    opt.step()
"""
#: A script with a table of rows.
ROWS = Path(__file__).with_name("train_rows.py")


def has_checkpoint(run: Cluster) -> bool:
    return bool(run.events("checkpoint"))


def launch(*arguments: object) -> tuple[int, str]:
    result = subprocess.run([sys.executable, str(LAUNCH), *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in result.stderr
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("policy", ["sync", pytest.param("async", marks=pytest.mark.long)])
def test_a_server_that_is_killed_is_started_again_and_the_run_goes_on(cluster: Start, undisturbed: str, policy: str) -> None:
    run = cluster(*TRAINING, "--policy", policy)
    run.until(lambda: has_checkpoint(run), "checkpoint")
    run.signal("server-1")
    summary = run.summary()
    assert len(run.events("restarted")) == 1
    if policy == "sync":
        assert summary["weights_sha256"] == undisturbed
    assert summary["dropped"] == 0
    assert run.is_exact()


@pytest.mark.long
def test_a_server_that_waits_for_its_file_before_tables_change_gives_signs_of_life(cluster: Start) -> None:
    slow = {VARIABLE: "server-0:saved:0:sleep"}
    run = cluster("--servers", 2, "--checkpoint-every", 0.1, "--heartbeat-timeout", 2, ROWS, env=slow)
    assert run.summary()["dropped"] == 0
    assert run.events("checkpoint")[0].data["round"] < run.rounds(), "nobody had to wait for a file"
    assert not run.events("lost") and not run.events("restarted")


@pytest.mark.long
def test_a_server_that_is_killed_while_it_hands_in_the_model_does_so_again(cluster: Start, undisturbed: str) -> None:
    run = cluster(*TRAINING, "--replicas", 1, env={VARIABLE: "server-1:uploading:0:kill"})
    assert run.summary()["weights_sha256"] == undisturbed
    assert len(list(run.folder.glob("failpoint-*"))) == 1 and run.is_exact()


# I21
def test_after_a_power_cut_a_run_goes_on_with_other_numbers(cluster: Start, resumed: Start, undisturbed: str) -> None:
    run = cluster(*TRAINING)
    run.until(lambda: has_checkpoint(run), "checkpoint")
    run.cut_power()
    summary = resumed("--workers", 1, "--servers", 3).summary()
    assert (summary["weights_sha256"], summary["servers"]) == (undisturbed, 3)
    assert run.is_exact()


def test_a_run_that_was_stopped_by_ctrl_c_goes_on_with_the_same_bits(
    cluster: Start, resumed: Start, undisturbed: str, tmp_path: Path
) -> None:
    run = cluster(*TRAINING)
    run.until(lambda: has_checkpoint(run), "checkpoint")
    run._popen.send_signal(signal.SIGINT)
    code, out = run.end()
    assert code == 130 and "stopped by SIGINT" in out and not (tmp_path / "run" / "summary.json").exists()
    summary = resumed().summary()
    assert summary["weights_sha256"] == undisturbed and summary["rounds"] == run.rounds()
    assert run.is_exact()


@pytest.mark.long
def test_all_that_are_started_again_when_the_run_has_finished_are_told_so_and_end(tmp_path: Path) -> None:
    folder, hashes = tmp_path / "run", set()
    for number in range(2):
        with Processes(tmp_path / f"logs-{number}", os.environ) as processes:
            run = ByHand(folder, processes, 1, 2, *TRAINING, "--rounds", 5, "--resume", "auto")
            try:
                hashes.add(run.summary()["weights_sha256"])
                processes.poll()
                assert [child.code for child in processes.children] == [0, 0, 0]
            finally:
                run.close()
    assert len(hashes) == 1 and "there is nothing left to do" in (tmp_path / "logs-1" / "worker-1.log").read_text()


def test_a_damaged_checkpoint_is_told_of_and_the_one_before_it_used(
    cluster: Start, resumed: Start, undisturbed: str, tmp_path: Path
) -> None:
    run = cluster(*TRAINING)
    run.until(lambda: len(run.events("checkpoint")) >= 2, "second checkpoint")
    run.cut_power()
    first, second = checkpoint.finished(tmp_path / "run")
    file = second / checkpoint.file_of(0)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    code, out = launch("checkpoint", "verify", tmp_path / "run")
    assert code == 1 and str(file) in out and f"{first}: good" in out
    assert resumed().summary()["weights_sha256"] == undisturbed
    assert str(file) in (tmp_path / "run" / "logs" / "coordinator.log").read_text()


def test_a_run_that_was_to_end_early_goes_on_and_its_checkpoints_hold_its_model(
    cluster: Start, resumed: Start, undisturbed: str, tmp_path: Path
) -> None:
    folder, out = tmp_path / "run", tmp_path / "model.safetensors"
    cluster(*TRAINING, "--rounds", 30).summary()
    for flags, words in (
        (("--seed", 1), "--seed cannot change on resume (0 -> 1, "),
        (("--model", "lenet"), "--model cannot change on resume (mlp -> lenet, "),
        (("x.py",), "one of the built-in"),
    ):
        code, text = launch("local", "--resume", folder, *flags)
        assert code == 2 and words in text
    summary = resumed("--rounds", 10_000).summary()
    assert summary["weights_sha256"] == undisturbed
    code, text = launch("checkpoint", "list", folder)
    assert code == 0 and str(summary["rounds"]) in text
    assert launch("checkpoint", "export", folder, "--out", out)[0] == 0
    found, trained = load_file(out), load_file(folder / "model.safetensors")
    assert found.keys() == trained.keys() and all(torch.equal(found[name], trained[name]) for name in found)
    assert launch("checkpoint", "export", folder, "--round", 1, "--out", out)[0] == 2


@pytest.mark.long
def test_a_checkpoint_of_another_version_is_refused_until_that_is_accepted_and_then_told_of(
    cluster: Start, resumed: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    cluster(*TRAINING, "--rounds", 5).summary()
    *_, newest = checkpoint.finished(folder)
    manifest = newest / checkpoint.MANIFEST_FILE
    values, here = json.loads(manifest.read_text()), versions_here()
    assert values["versions"] == {"program": here.program, "torch": here.torch}
    manifest.write_text(json.dumps({**values, "versions": {"program": here.program, "torch": "1.0"}}))
    code, text = launch("checkpoint", "verify", folder)
    assert code == 0 and f"{newest}: good, of roundtable {here.program} with torch 1.0" in text
    assert re.search(rf" {re.escape(here.program)} +1\.0 ", launch("checkpoint", "list", folder)[1])
    sentence = f"{newest} was made by roundtable {here.program} with torch 1.0, and this is {here}; results may differ"
    for command in (("local", "--resume", folder), ("coordinator", "--prepared=resume", "--run-dir", folder)):
        code, text = launch(*command)
        assert code == 2 and sentence in text.splitlines()[-1] and checkpoint.finished(folder)[-1] == newest
    assert (folder / "summary.json").exists()
    code, text = resumed("--rounds", 8, "--allow-version-mismatch").end()
    assert code == 0 and f"warning: the checkpoint {sentence}" in text
    *_, last = checkpoint.finished(folder)
    (last / checkpoint.MANIFEST_FILE).write_text(json.dumps({**values, "format": 2}))
    code, text = launch("local", "--resume", folder, "--allow-version-mismatch")
    assert code == 2 and f"{last} was made by {here} in format 2, and this is {here}, which reads format 1" in text


def test_a_script_whose_layers_have_changed_is_refused_and_told_which(cluster: Start, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("WIDTH", "8"))
    run = cluster("--workers", 1, "--servers", 1, script)
    run.summary()
    script.write_text(SCRIPT.replace("WIDTH", "9"))
    code, out = launch("local", "--resume", run.folder, "--epochs", 20)
    assert code == 2  # nobody is left to go on, by a mistake of the user's
    assert "worker-0's model is not the checkpoint's: it has '0.weight' (float32 [9, 4], parameter group 0)" in out
    assert "where the checkpoint has '0.weight' (float32 [8, 4], parameter group 0)" in out


def test_what_has_no_checkpoints_cannot_go_on(cluster: Start, tmp_path: Path) -> None:
    cluster(*TRAINING, "--checkpoint-every", 0, "--rounds", 5).summary()
    code, text = launch("local", "--resume", tmp_path / "run")
    assert code == 2 and "no checkpoint to resume from" in text
    code, text = launch("local", "--resume", tmp_path / "nothing")
    assert code == 2 and "not found: give a run directory" in text


def test_training_begins_from_weights_in_a_file(cluster: Start, tmp_path: Path) -> None:
    first = cluster(*TRAINING, "--rounds", 5, name="first").summary()
    saved, of_torch = tmp_path / "first" / "model.safetensors", tmp_path / "state.pt"
    torch.save(load_file(saved), of_torch)
    for file in (saved, of_torch):
        flags = (*TRAINING, "--init", file, "--rounds", 1, "--lr", 1e-30, "--momentum", 0)
        assert cluster(*flags, name=file.stem).summary()["weights_sha256"] == first["weights_sha256"]
    code, text = launch("local", "--run-dir", tmp_path / "third", *TRAINING, "--init", tmp_path / "none")
    assert code == 2 and "there is no file" in text
