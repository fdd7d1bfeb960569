"""A loss that is a mean over tokens trains as in a plain loop, which is written here without this library."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch_alone import sha256, tree_sum
from train_weights import EPOCHS, GLOBAL_BATCH, IGNORED, MICRO_BATCH, OPTIMIZER, dataset, tagger, token_loss

from roundtable.common.runtime.failpoints import VARIABLE
from roundtable.common.storage.event_log import FILE_NAME, RunLogReader

SCRIPT = Path(__file__).with_name("train_weights.py")
LAUNCH = Path(__file__).parents[2] / "launch.py"

pytestmark = pytest.mark.usefixtures("one_thread")


def global_batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    words, tags = dataset().tensors
    for _ in range(EPOCHS):
        yield from zip(words.split(GLOBAL_BATCH), tags.split(GLOBAL_BATCH), strict=True)


def plain_loop(whole_batches: bool) -> tuple[nn.Module, list[float]]:
    """Train with torch alone; return the model and the loss of each round that has tokens.

    `whole_batches`: one forward and backward for a global batch. Otherwise micro-batches are added along the tree.
    """
    model, losses = tagger(), []
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, **OPTIMIZER)
    for words, tags in global_batches():
        part, terms = GLOBAL_BATCH if whole_batches else MICRO_BATCH, []
        for some_words, some_tags in zip(words.split(part), tags.split(part), strict=True):
            tokens = int((some_tags != IGNORED).sum())
            loss = token_loss(model, some_words, some_tags)
            gradients = torch.autograd.grad(loss, parameters)
            weighted = [g * tokens if tokens else torch.zeros_like(g) for g in gradients]
            terms.append(torch.cat([g.flatten() for g in weighted] + [torch.tensor([loss.item() * tokens if tokens else 0.0])]))
        all_tokens = int((tags != IGNORED).sum())
        if not all_tokens:
            continue
        mean = tree_sum(terms) / all_tokens
        for parameter, gradient in zip(parameters, mean[:-1].split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        losses.append(float(mean[-1]))
    return model, losses


def test_the_tree_of_micro_batches_is_the_mean_over_the_global_batch() -> None:
    (ours, our_losses), (plain, losses) = plain_loop(whole_batches=False), plain_loop(whole_batches=True)
    assert our_losses == pytest.approx(losses, rel=1e-5)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "kind", "fault"),
    [
        (["--workers", 1, "--servers", 1], "all", ""),
        (["--workers", 2, "--servers", 2, "--transport", "tcp"], "kept", ""),
        (["--workers", 3, "--servers", 2], "all", "worker-1:computing:4:kill"),
    ],
)
def test_micro_batches_count_by_tokens_whoever_computes_them(
    flags: list[Any], kind: str, fault: str, launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault:
        monkeypatch.setenv(VARIABLE, fault)
    summary = launch(*flags, "--threads", 1, SCRIPT, "--", kind)
    model, losses = plain_loop(whole_batches=False)
    assert summary["weights_sha256"] == sha256(model)
    assert {name: p.tolist() for name, p in load_file(tmp_path / "run" / "model.safetensors").items()} == {
        name: p.tolist() for name, p in model.state_dict().items()
    }
    assert (summary["samples"], summary["rounds"], summary["dropped"]) == (96 * EPOCHS, 4 * EPOCHS, 0)
    tokens = [float((tags != IGNORED).sum()) for _, tags in global_batches()]
    with contextlib.closing(RunLogReader(tmp_path / "run" / FILE_NAME)) as log:
        rows = log.rounds()
        lost = [event.process for _, _, event in log.events() if event.kind == "lost"]
    assert lost == (["worker-1"] if fault else [])
    assert [row.total_weight for row in rows] == tokens and {row.samples for row in rows} == {GLOBAL_BATCH}
    assert [row.metrics["loss"] for row in rows if row.weight] == pytest.approx(losses, rel=1e-5)
    assert [row.metrics for row in rows if not row.total_weight] == [{}] * EPOCHS
    newest = [(row.metrics["loss"], row.total_weight) for row in rows[-4:] if row.total_weight]
    assert summary["loss"] == pytest.approx(sum(loss * w for loss, w in newest) / sum(w for _, w in newest), rel=1e-5)


@pytest.mark.slow
def test_a_weight_that_is_no_number_ends_the_run_with_one_sentence(tmp_path: Path) -> None:
    line = 1 + next(n for n, text in enumerate(SCRIPT.read_text().splitlines()) if "float(wrong)" in text)
    command = [sys.executable, LAUNCH, "local", "--run-dir", tmp_path / "run", "--workers", "1", SCRIPT, "--", "all", "nan"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"the weight of a micro-batch is nan (train_weights.py line {line}): opt.step(weight=...) takes" in result.stderr
