"""On real images, held-out ones among them: what each policy trains to, next to a single process.

A small network, for the mean of weights that were trained apart is better than those only while these lie close together:
with `lenet` on the same images, `average` comes out below its parts. Even here it does for one seed in seven, so it is
judged over several. An accuracy is a count among 360 images: one of them is 0.28 points.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from roundtable.common.storage.event_log import FILE_NAME, RunLogReader

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]

Launch = Callable[..., dict[str, Any]]

TRAINING = ("--data", "digits", "--model", "mlp", "--epochs", 8, "--lr", 0.05)
CLUSTER = ("--workers", 3, "--servers", 2)
POINT = 0.01


def test_every_policy_comes_within_a_point_of_a_single_process_and_an_average_is_better_than_the_mean_of_its_parts(
    launch: Launch, tmp_path: Path
) -> None:
    alone = launch("--workers", 1, "--servers", 1, *TRAINING, name="alone")["accuracy"]
    policies = ("sync", "backup", "ssp", "async", "local", "average")
    found = {policy: launch(*CLUSTER, "--policy", policy, *TRAINING, name=policy)["accuracy"] for policy in policies}
    assert alone > 0.95
    assert min(found.values()) >= alone - POINT, (alone, found)

    for seed in (1, 2):
        launch(*CLUSTER, "--policy", "average", "--seed", seed, *TRAINING, name=f"average-{seed}")
    merged, parts = [], []
    for name in ("average", "average-1", "average-2"):
        with contextlib.closing(RunLogReader(tmp_path / name / FILE_NAME)) as log:
            parts.append([value for *_, value in log.metrics("part_accuracy")])
        merged.append(json.loads((tmp_path / name / "summary.json").read_text())["accuracy"])
    assert [len(part) for part in parts] == [3, 3, 3]
    assert mean(merged) > mean(map(mean, parts)), (merged, parts)


def test_codecs_come_within_a_point_of_plain_training_with_a_fraction_of_the_bytes(launch: Launch) -> None:
    flags = {
        "plain": "--transport tcp",
        "int8-bf16": "--transport tcp --compress-gradients int8 --compress-weights bf16",
        "topk-int8": "--transport tcp --compress-gradients topk --topk-ratio 0.1 --compress-weights int8",
        "memory": "--compress-weights onebit",
    }
    found = {name: launch(*CLUSTER, *flags[name].split(), *TRAINING, name=name) for name in flags}
    plain = found["plain"]
    assert min(summary["accuracy"] for summary in found.values()) >= plain["accuracy"] - POINT, found
    most = {"int8-bf16": (0.3, 0.55), "topk-int8": (0.25, 0.3), "memory": (0.0, 0.02)}  # masters are sent for each evaluation
    for name, (pushed, pulled) in most.items():
        assert found[name]["wire"]["pushed_bytes"] <= pushed * plain["wire"]["pushed_bytes"], found
        assert found[name]["wire"]["pulled_bytes"] <= pulled * plain["wire"]["pulled_bytes"], found
