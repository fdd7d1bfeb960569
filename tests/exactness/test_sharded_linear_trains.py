"""Layers that are sharded over the servers train to the weights of plain linear ones; their bits do not depend on the workers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from roundtable.common.storage.event_log import RunLogReader

sys.path.insert(0, str(Path(__file__).parent))
from train_classes import EPOCHS, GLOBAL_BATCH, MICRO_BATCH, RECIPES, SAMPLES, Net, dataset, make, schedule

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SCRIPT = Path(__file__).with_name("train_classes.py")


def plain_loop(recipe: str, bias: bool, smoothing: float, clip: float | None) -> tuple[dict[str, torch.Tensor], float, float]:
    """The trained weights, the loss that they come to, and the sum of the five largest logits of each sample."""
    model = Net(*make(bias))
    cls, hyper = RECIPES[recipe]
    optimizer = cls(model.parameters(), **hyper)
    scheduler = schedule(optimizer)
    x, y = dataset().tensors
    for _ in range(EPOCHS):
        for bx, by in zip(x.split(GLOBAL_BATCH), y.split(GLOBAL_BATCH), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(bx), by, label_smoothing=smoothing).backward()
            if clip is not None:
                assert nn.utils.clip_grad_norm_(model.parameters(), clip) > clip
            optimizer.step()
            scheduler.step()
    with torch.no_grad():
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, y, label_smoothing=smoothing)
        return dict(model.state_dict()), float(loss), float(logits.topk(5).values.double().sum())


def metric(folder: Path, name: str) -> list[float]:
    return [value for _, _, _, value in RunLogReader(folder / "events.sqlite").metrics(name)]


@pytest.mark.parametrize(
    ("recipe", "flags", "servers"),
    [
        ("momentum", [], [1, 3]),
        ("momentum", ["--hidden"], [1, 3]),
        ("momentum", ["--hidden", "--clip", 0.3, "--bias"], [2]),
        ("adam", ["--bias", "--smoothing", 0.1], [3]),
    ],
)
def test_weights_are_those_of_plain_linear_layers(
    recipe: str, flags: list[Any], servers: list[int], launch: Any, tmp_path: Path
) -> None:
    smoothing, clip = 0.1 if "--smoothing" in flags else 0.0, 0.3 if "--clip" in flags else None
    expected, loss, top = plain_loop(recipe, "--bias" in flags, smoothing, clip)
    for count in servers:
        name = f"on-{count}"
        summary = launch("--workers", 2, "--servers", count, SCRIPT, "--", recipe, *flags, name=name)
        assert summary["samples"] == SAMPLES * EPOCHS
        assert summary["micro_batches_committed"] == EPOCHS * -(-GLOBAL_BATCH // MICRO_BATCH) * 4 + EPOCHS * -(-30 // MICRO_BATCH)
        found = load_file(tmp_path / name / "model.safetensors")
        assert found.keys() == expected.keys()
        atol = 1e-6 if recipe != "adam" else 3e-5  # it divides by a gradient's size, and of tiny ones much is rounding
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=atol)
        assert metric(tmp_path / name, "final") == pytest.approx([loss] * 2, rel=1e-6)
        assert metric(tmp_path / name, "top") == pytest.approx([top] * 2, rel=1e-5)


@pytest.mark.parametrize("policy", ["sync", "async"])
def test_the_classifier_of_the_examples_learns(policy: str, launch: Any, tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "sharded_classifier.py"
    flags = ("--classes", 700, "--samples", 7000, "--epochs", 1, "--sample-rate", 0.5)
    summary = launch("--workers", 2, "--servers", 2, "--policy", policy, script, "--", *flags)
    assert summary["samples"] == 7000 and summary["dropped"] == 0
    (accuracy,) = metric(tmp_path / "run", "accuracy")
    assert accuracy > 0.7


def test_the_hybrid_of_the_examples_learns_a_folder_of_images(launch: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(30):
            pixels = torch.randint(0, 200, (18, 20, 3), generator=generator, dtype=torch.uint8)
            pixels[..., channel] += 50
            Image.fromarray(pixels.numpy()).save(tmp_path / "images" / name / f"{number}.png")
    script = Path(__file__).parents[2] / "examples" / "hybrid.py"
    flags = ("--model", "cnn", "--side", 16, "--epochs", 6, "--lr", 3e-3)
    launch("--workers", 2, "--servers", 2, script, "--", tmp_path / "images", *flags)
    assert metric(tmp_path / "run", "accuracy")[0] > 0.9


def test_hybrid_trains_the_built_in_example_as_data_parallelism_does(launch: Any, tmp_path: Path) -> None:
    losses = []
    for parallel in ("data", "hybrid"):
        launch("--parallel", parallel, "--data", "digits", "--model", "cnn", "--rounds", 12, name=parallel)
        losses.append([row.metrics["loss"] for row in RunLogReader(tmp_path / parallel / "events.sqlite").rounds()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    found = [load_file(tmp_path / parallel / "model.safetensors") for parallel in ("data", "hybrid")]
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-3, atol=1e-4)
