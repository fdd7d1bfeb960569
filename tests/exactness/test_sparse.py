"""Tables of which only rows are sent train to the bits of dense ones in a plain loop, whatever the cluster; and alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from roundtable.common.config.batch_plan import derive_seed
from roundtable.common.storage.event_log import RunLogReader

sys.path.insert(0, str(Path(__file__).parent))
from train_sparse import DRAWN, EPOCHS, GLOBAL_BATCH, MICRO_BATCH, RECIPES, SAMPLES, Net, dataset, schedule

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SCRIPT = Path(__file__).with_name("train_sparse.py")


def drawn() -> nn.Embedding:
    """A dense embedding with the rows that servers draw: 64 at a time, each time from a seed of its own."""
    blocks = []
    for block, first in enumerate(range(0, DRAWN, 64)):
        generator = torch.Generator().manual_seed(derive_seed(0, "rows of drawn.weight", block))
        blocks.append(torch.empty(min(64, DRAWN - first), 1).normal_(0.0, 0.3, generator=generator))
    return nn.Embedding.from_pretrained(torch.cat(blocks), freeze=False)


def plain_loop(recipe: str, clip: float | None = None) -> tuple[dict[str, torch.Tensor], float]:
    """The trained weights, and the loss that they come to."""
    model = Net(drawn(), sparse=False)
    parameters = list(model.parameters())
    cls, hyper = RECIPES[recipe]
    optimizer = cls(parameters, **hyper)
    scheduler = schedule(optimizer)
    x, y = dataset().tensors
    round_ = 0
    for _ in range(EPOCHS):
        for bx, by in zip(x.split(GLOBAL_BATCH), y.split(GLOBAL_BATCH), strict=True):
            terms: list[dict[int, torch.Tensor]] = []
            for mx, my in zip(bx.split(MICRO_BATCH), by.split(MICRO_BATCH), strict=True):
                mx, my = mx.clone(), my.clone()  # as collating makes them: bits may depend on where a view begins
                model.zero_grad()
                nn.functional.mse_loss(model(mx, round_ % 2 == 0), my).backward()
                terms.append({i: p.grad * len(mx) for i, p in enumerate(parameters) if p.grad is not None})
            while len(terms) > 1:
                for a, b in zip(terms[::2], terms[1::2], strict=False):
                    a.update({i: a[i] + b[i] for i in b})
                terms = terms[::2]
            for i, parameter in enumerate(parameters):
                parameter.grad = terms[0][i] / len(bx) if i in terms[0] else None
            if clip is not None:
                assert nn.utils.clip_grad_norm_(parameters, clip) > clip
            optimizer.step()
            scheduler.step()
            round_ += 1
    with torch.no_grad():
        return dict(model.state_dict()), float(nn.functional.mse_loss(model(x, True), y))


def check(folder: Path, expected: dict[str, torch.Tensor], final: float) -> None:
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []
    assert {value for _, _, _, value in RunLogReader(folder / "events.sqlite").metrics("final")} == {final}


def test_tables_are_the_plain_loops_dense_ones_whatever_the_cluster(launch: Any, tmp_path: Path) -> None:
    expected, final = plain_loop("adagrad")
    for workers, servers, transport in [(2, 2, "tcp"), (4, 3, "auto")]:
        summary = launch(
            "--workers", workers, "--servers", servers, "--transport", transport, SCRIPT, "--", "adagrad", name=transport + "-run"
        )
        assert summary["samples"] == SAMPLES * EPOCHS and summary["micro_batches_committed"] == (8 * 4 + 5) * EPOCHS
        check(tmp_path / (transport + "-run"), expected, final)
        assert (
            min(summary["wire"]["pushed_bytes"], summary["wire"]["pulled_bytes"]) > 10_000
        )  # rows do travel in either transport


def test_clipping_by_norm_goes_over_tables_too(launch: Any, tmp_path: Path) -> None:
    expected, final = plain_loop("adagrad", clip=0.2)
    launch("--workers", 2, "--servers", 2, SCRIPT, "--", "adagrad", "--clip", 0.2)
    found = load_file(tmp_path / "run" / "model.safetensors")
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)
    values = [value for _, _, _, value in RunLogReader(tmp_path / "run" / "events.sqlite").metrics("final")]
    assert values == pytest.approx([final] * 2, rel=1e-5)


@pytest.mark.long
def test_adam_comes_to_the_same_bits_on_other_clusters_and_alone(launch: Any, tmp_path: Path) -> None:
    """Its plain loop would move rows that are not touched; tests/ps compares its steps."""
    many = launch("--workers", 3, "--servers", 3, SCRIPT, "--", "adam")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("ROUNDTABLE_COORDINATOR", None)
    subprocess.run([sys.executable, SCRIPT, "adam"], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=120)
    alone = json.loads((tmp_path / "runs" / "train_sparse" / "summary.json").read_text())
    assert alone["weights_sha256"] == many["weights_sha256"]


def test_the_click_model_of_the_examples_learns(launch: Any, tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "wide_and_deep.py"
    launch(script, "--", "--rows", 200, "--samples", 20_000)
    ((_, _, _, auc),) = RunLogReader(tmp_path / "run" / "events.sqlite").metrics("auc")
    assert auc > 0.6


@pytest.mark.parametrize("policy", ["backup", "async"])
def test_other_policies_train_tables_too(policy: str, launch: Any, tmp_path: Path) -> None:
    summary = launch("--workers", 3, "--servers", 2, "--policy", policy, SCRIPT, "--", "adagrad", "--clip", 0.5)
    assert summary["rounds"] == 5 * EPOCHS
    assert summary["micro_batches_committed"] + summary["dropped"] == (8 * 4 + 5) * EPOCHS
    losses = [row.metrics["loss"] for row in RunLogReader(tmp_path / "run" / "events.sqlite").rounds()]
    assert losses[-1] < losses[0]
