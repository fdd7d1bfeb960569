"""In synchronous mode the weights do not depend on how many workers and servers there are, or how fast: they are those of a
plain loop in one process that adds up micro-batch gradients along the tree."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn
from torch_alone import sha256, take_gradients

from roundtable.common.storage.event_log import FILE_NAME, RunLogReader

sys.path.insert(0, str(Path(__file__).parent))
from train_exact import GLOBAL_BATCH, MICRO_BATCH, RECIPES, Reused, dataset, network, reused

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS = 3


def plain_loop(
    recipe: str, epochs: int = EPOCHS, whole_batches: bool = False, *size: int, model: nn.Module | None = None
) -> nn.Module:
    """Train in this process with torch alone. `whole_batches`: an ordinary step on the mean loss of the global batch."""
    x, y = dataset().tensors
    model = network(*size) if model is None else model
    parameters = list(model.parameters())
    cls, hyper, schedule, clip_norm = RECIPES[recipe]
    opt = cls(parameters, **hyper)
    scheduler = schedule(opt) if schedule else None
    for _ in range(epochs):
        for bx, by in zip(x.split(GLOBAL_BATCH), y.split(GLOBAL_BATCH), strict=True):
            part = len(bx) if whole_batches else MICRO_BATCH
            parts = zip(bx.split(part), by.split(part), strict=True)
            take_gradients(parameters, ((nn.functional.cross_entropy(model(mx), my), len(mx)) for mx, my in parts))
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, clip_norm)
            opt.step()
            if scheduler:
                scheduler.step()
    return model


@pytest.mark.parametrize(
    "recipe", [pytest.param(recipe, marks=[pytest.mark.slow] if recipe != "momentum" else []) for recipe in RECIPES]
)
# I5
def test_weights_are_the_plain_loops_whatever_the_cluster(recipe: str, launch) -> None:
    expected = sha256(plain_loop(recipe))
    clusters = [(1, 1, -1), (2, 2, -1), (4, 3, -1), (3, 2, 1)]
    found = {}
    for number, (workers, servers, slow) in enumerate(clusters):
        transport = "tcp" if number == 1 else "auto"
        summary = launch(
            "--workers", workers, "--servers", servers, "--transport", transport, Path(__file__).with_name("train_exact.py"),
            "--", recipe, "--epochs", EPOCHS, "--slow", slow, name=f"run-{number}",
        )  # fmt: skip
        assert summary["samples"] == 1000 * EPOCHS and summary["rounds"] == 9 * EPOCHS
        assert summary["micro_batches_committed"] == (8 * 8 + 3) * EPOCHS
        found[number, workers, servers, transport, slow] = summary["weights_sha256"]
    assert set(found.values()) == {expected}, found


@pytest.mark.slow
@pytest.mark.parametrize(("hidden", "layers"), [((8 << 20) // (128 * 4), 1), (1536, 2)])
def test_large_contributions_are_added_to_the_one_before_or_left_where_they_lie_to_the_same_weights(
    hidden: int, layers: int, launch, tmp_path: Path
) -> None:
    args = ("momentum", "--epochs", 1, "--hidden", hidden, "--layers", layers)
    summary = launch("--workers", 2, "--servers", 2, Path(__file__).with_name("train_exact.py"), "--", *args)
    assert summary["weights_sha256"] == sha256(plain_loop("momentum", 1, False, hidden, layers))
    with contextlib.closing(RunLogReader(tmp_path / "run" / FILE_NAME)) as log:
        sizes = [row.hi - row.lo for row in log.contributions() if row.outcome == "committed"]
    assert sum(sizes) == 8 * 8 + 3  # in 9 rounds
    assert (
        set(sizes) == {1, 2} and sizes.count(2) >= 9
    )  # servers add up what is in up to 4 gradient buffers of a worker and round


@pytest.mark.slow
def test_a_layer_may_be_used_another_number_of_times_in_each_micro_batch(launch) -> None:
    uses = [Reused.uses(x) for batch in dataset().tensors[0].split(GLOBAL_BATCH) for x in batch.split(MICRO_BATCH)]
    assert set(uses) == {1, 2, 3, 4}
    expected = sha256(plain_loop("momentum", 1, model=reused()))
    for number, (workers, servers) in enumerate([(1, 1), (2, 3)]):
        summary = launch(
            "--workers", workers, "--servers", servers, Path(__file__).with_name("train_exact.py"),
            "--", "momentum", "--epochs", 1, "--reused", name=f"run-{number}",
        )  # fmt: skip
        assert summary["weights_sha256"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["int8"])
@pytest.mark.long
def test_compressed_weights_are_the_same_through_memory_and_sockets(codec: str, launch) -> None:
    found = {}
    for number, (workers, servers, transport) in enumerate([(1, 1, "auto"), (3, 2, "auto"), (2, 3, "tcp")]):
        summary = launch(
            "--workers", workers, "--servers", servers, "--transport", transport, "--compress-weights", codec,
            Path(__file__).with_name("train_exact.py"), "--", "momentum", "--epochs", EPOCHS, name=f"run-{number}",
        )  # fmt: skip
        found[workers, servers, transport] = summary["weights_sha256"]
    assert len(set(found.values())) == 1 and found[1, 1, "auto"] != sha256(plain_loop("momentum")), found


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_ordinary_large_batch_step_gives_the_same_weights_to_rounding(recipe: str) -> None:
    ours, ordinary = (plain_loop(recipe, epochs=6, whole_batches=whole) for whole in (False, True))  # 54 rounds
    for a, b in zip(ours.parameters(), ordinary.parameters(), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.slow
def test_alone_a_script_trains_to_the_same_weights(tmp_path: Path) -> None:
    script = Path(__file__).with_name("train_exact.py")
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, script, "momentum", "--epochs", str(EPOCHS)],
        cwd=tmp_path, env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    import json

    (summary,) = tmp_path.glob("runs/*/summary.json")
    assert json.loads(summary.read_text())["weights_sha256"] == sha256(plain_loop("momentum"))
