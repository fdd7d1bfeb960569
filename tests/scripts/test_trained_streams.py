"""A run over a stream has the weights of a plain loop, which is written here without this library's workers and servers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch_alone import sha256, tree_sum
from train_streams import EPOCHS, GLOBAL_BATCH, MICRO_BATCH, OPTIMIZER, SHARDS, WINDOW, decode, network, open_shard, sample_of

from roundtable.common.config.batch_plan import derive_seed, make_segment
from roundtable.common.runtime.failpoints import VARIABLE
from roundtable.worker.data.streams.order import StreamOrder
from roundtable.worker.data.streams.stream import Stream

SCRIPT = Path(__file__).with_name("train_streams.py")
LAUNCH = Path(__file__).parents[2] / "launch.py"
SAMPLES = [(shard, number) for shard, length in enumerate(SHARDS) for number in range(length)]
ROUNDS = -(-len(SAMPLES) // GLOBAL_BATCH) * EPOCHS

pytestmark = pytest.mark.usefixtures("one_thread")


def epoch_of(epoch: int, is_shuffled: bool) -> list[int]:
    """The numbers of an epoch's samples, in order."""
    if not is_shuffled:
        return list(range(len(SAMPLES)))
    plan = make_segment(
        before=None, samples=len(SAMPLES), global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, epochs=EPOCHS, round_limit=None
    )
    order = StreamOrder(Stream(len(SHARDS), open_shard, SHARDS), 0, True, WINDOW).of(plan, epoch)
    found = [order[place] for place in range(len(SAMPLES))]
    assert sorted(found) == list(range(len(SAMPLES)))
    return found


def load(epoch: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A sample with the noise that it has in an epoch."""
    seed = derive_seed(0, "sample", epoch, index)
    torch.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)
    return decode(sample_of(*SAMPLES[index]))


def plain_loop(is_shuffled: bool) -> str:
    """Train with torch alone, and return a hash of the weights."""
    model = network()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, **OPTIMIZER)
    for epoch in range(EPOCHS):
        indices = epoch_of(epoch, is_shuffled)
        for start in range(0, len(indices), GLOBAL_BATCH):
            whole, terms = indices[start : start + GLOBAL_BATCH], []
            for at in range(0, len(whole), MICRO_BATCH):
                x, y = map(torch.stack, zip(*(load(epoch, index) for index in whole[at : at + MICRO_BATCH]), strict=True))
                gradients = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters)
                terms.append(torch.cat([gradient.flatten() for gradient in gradients]) * len(x))
            mean = tree_sum(terms) / len(whole)
            for parameter, gradient in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = gradient.view_as(parameter)
            optimizer.step()
    return sha256(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "kind", "fault"),
    [
        pytest.param(["--workers", 1, "--servers", 1], "processes", "", marks=pytest.mark.long),
        (["--workers", 3, "--servers", 2], "shards", "worker-1:computing:4:kill"),
        (["--workers", 2, "--servers", 1, "--transport", "tcp"], "plain", "worker-0:pushed:7:kill"),
    ],
)
def test_each_sample_counts_once_whoever_reads_it(
    flags: list[Any], kind: str, fault: str, launch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault:
        monkeypatch.setenv(VARIABLE, fault)
    summary = launch(*flags, "--threads", 1, SCRIPT, "--", kind)
    assert (summary["samples"], summary["rounds"], summary["dropped"]) == (len(SAMPLES) * EPOCHS, ROUNDS, 0)
    assert summary["weights_sha256"] == plain_loop(is_shuffled=kind != "plain")


@pytest.mark.slow
@pytest.mark.long
def test_under_another_policy_too_each_sample_counts_once(launch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "worker-0:pushed:5:kill")
    summary = launch("--workers", 2, "--servers", 1, "--policy", "async", SCRIPT, "--", "shards")
    assert (summary["samples"], summary["rounds"], summary["dropped"]) == (len(SAMPLES) * EPOCHS, ROUNDS, 0)


@pytest.mark.slow
def test_a_run_that_goes_on_in_the_middle_of_an_epoch_reads_what_is_left(launch: Any, tmp_path: Path) -> None:
    launch("--workers", 2, "--servers", 2, "--threads", 1, "--rounds", 9, SCRIPT, "--", "shards")
    command = [
        sys.executable,
        LAUNCH,
        "local",
        "--resume",
        tmp_path / "run",
        "--workers",
        "3",
        "--servers",
        "1",
        "--rounds",
        "100",
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["samples"], summary["rounds"]) == (len(SAMPLES) * EPOCHS, ROUNDS)
    assert summary["weights_sha256"] == plain_loop(is_shuffled=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        pytest.param("long", ", though it was said to have 60: correct this", marks=pytest.mark.long),
        ("deaf", "Stream cannot be opened at a position: shard 0 at position 1 does not begin with its second sample"),
    ],
)
def test_a_stream_that_is_not_as_said_ends_the_run_with_one_sentence(kind: str, said: str, tmp_path: Path) -> None:
    command = [sys.executable, LAUNCH, "local", "--run-dir", tmp_path / "run", "--workers", "1", SCRIPT, "--", kind]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert said in result.stderr
