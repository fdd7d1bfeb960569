"""The weights of replicas in a merge, and the use of their mean, in real clusters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from roundtable.common.storage.event_log import FILE_NAME, RunLogReader
from roundtable.worker.merge.averaging import mean

pytestmark = [pytest.mark.slow, pytest.mark.long]

SCRIPT = Path(__file__).parent / "train_parts.py"
CLUSTER = ("--workers", 3, "--servers", 2)
ROUNDS = 40  # of each of the two segments

Launch = Callable[..., dict[str, Any]]


def weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the statistics of batch normalisation."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("1.") or name in ("1.weight", "1.bias")}


def test_a_greedy_merge_is_the_mean_of_the_replicas_that_help_and_leaves_a_ruined_one_out(launch: Launch, tmp_path: Path) -> None:
    summary = launch(*CLUSTER, "--policy", "average", "--average-weights-by", "greedy", SCRIPT, "--", tmp_path, "--ruin")
    ends = [load_file(tmp_path / f"end-{worker}.safetensors") for worker in range(3)]
    with contextlib.closing(RunLogReader(tmp_path / "run" / FILE_NAME)) as log:
        chosen = [int(value) for *_, value in log.metrics("merged_parts")]
    parts = [load_file(tmp_path / f"part-{2 * ROUNDS}-{worker}.safetensors") for worker in range(3)]
    candidates = [[0, 2]] if chosen[1] == 2 else [[0], [2]]
    merges = [mean([weights(parts[i]) for i in numbers], [1.0] * len(numbers)) for numbers in candidates]
    found = weights(ends[0])
    assert any(all(torch.allclose(merged[name], found[name], rtol=1e-6) for name in found) for merged in merges)
    for name, tensor in ends[0].items():  # statistics too, and so in the model's file
        assert torch.equal(tensor, ends[1][name]) and torch.equal(tensor, ends[2][name])
        assert torch.equal(tensor, load_file(tmp_path / "run" / "model.safetensors")[name])
    assert len(chosen) == summary["merges"] == 2
    assert summary["samples"] == 480 * 4  # also of those that were left out


def test_a_uniform_merge_counts_replicas_of_unequal_shares_alike(launch: Launch, tmp_path: Path) -> None:
    launch("--workers", 2, "--servers", 2, "--policy", "average", "--average-weights-by", "uniform", SCRIPT, "--", tmp_path)
    parts = [weights(load_file(tmp_path / f"part-{2 * ROUNDS}-{worker}.safetensors")) for worker in range(2)]
    found = load_file(tmp_path / "end-0.safetensors")
    for name, tensor in mean(parts, [1, 1]).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(mean(parts, [2, 1])["0.weight"], found["0.weight"])  # as their micro-batches are divided


def test_rounds_before_local_steps_are_those_of_sync_but_for_rounding(launch: Launch, tmp_path: Path) -> None:
    flags = (*CLUSTER, "--data", "digits", "--model", "mlp", "--rounds", 12, "--lr", 0.05)
    launch(*flags, name="sync")
    summary = launch(*flags, "--policy", "local", "--local-after", 12, name="together")
    assert summary["rounds"] == summary["merges"] == 12
    sync, together = (load_file(tmp_path / name / "model.safetensors") for name in ("sync", "together"))
    for name, tensor in sync.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "flags",
    [
        ("local", "--local-steps", 4, "--outer-lr", 1, "--outer-momentum", 0),
        ("average",),
        ("average", "--average-weights-by", "greedy"),
    ],
    ids=lambda flags: " ".join(map(str, flags[:3])),
)
def test_workers_may_unfreeze_a_layer_at_different_merges(flags: tuple[Any, ...], launch: Launch, tmp_path: Path) -> None:
    launch(*CLUSTER, "--policy", *flags, SCRIPT.with_name("train_thaws.py"), "--", tmp_path, flags[0])
    merges = 4 if flags[0] == "local" else 2
    for merge in {2: (1, 2), 4: (4,)}[merges]:
        parts = [load_file(tmp_path / f"before-{merge}-{worker}.safetensors") for worker in range(3)]
        found = [load_file(tmp_path / f"after-{merge}-{worker}.safetensors") for worker in range(3)]
        assert not torch.equal(parts[0]["2.weight"], parts[2]["2.weight"])
        merged = [mean(parts, [1, 1, 1])]
        if "greedy" in flags:
            merged = [mean([parts[i] for i in chosen], [1.0] * len(chosen)) for chosen in ([0], [1], [2], [0, 1], [0, 2], [1, 2])]
        for one in found:
            assert any(all(torch.allclose(one[name], m[name], rtol=1e-5, atol=1e-6) for name in m) for m in merged)
    final = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(tensor, final[name]) for name, tensor in found[0].items())
