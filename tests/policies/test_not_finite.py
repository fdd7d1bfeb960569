"""Gradients that are not finite end the run with a sentence, are left out with their whole round, or are let through."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

LAUNCH = Path(__file__).parents[2] / "launch.py"
SCRIPT = Path(__file__).with_name("train_nan.py")
ROUNDS, EPOCHS = 4, 2  # of 16 samples each, 4 a micro-batch
FLAGS = ("--global-batch", 16, "--micro-batch", 4, SCRIPT)


def test_the_whole_round_is_skipped_alike_by_all_servers_whoever_computes_it(launch: Callable[..., dict[str, Any]]) -> None:
    shared = launch("--workers", 2, "--servers", 2, "--on-nonfinite", "skip", *FLAGS, name="shared")
    sent = launch("--workers", 1, "--servers", 1, "--transport", "tcp", "--on-nonfinite", "skip", *FLAGS, name="sent")
    assert shared["weights_sha256"] == sent["weights_sha256"]
    for summary in (shared, sent):
        assert (summary["dropped"], summary["samples_dropped"]) == (4 * EPOCHS, 16 * EPOCHS)
        assert (summary["rounds"], summary["samples"]) == (ROUNDS * EPOCHS, (ROUNDS - 1) * 16 * EPOCHS)


@pytest.mark.parametrize(
    ("policy", "least", "most"),
    [(("async",), 1, 4), (("backup", "--backup-micro-batches", 0), 4, 4), (("backup", "--backup-micro-batches", 1), 4, 7)],
)
def test_no_other_policy_lets_them_into_the_weights_either(
    launch: Callable[..., dict[str, Any]], policy: tuple[object, ...], least: int, most: int
) -> None:
    summary = launch("--workers", 2, "--servers", 2, "--on-nonfinite", "skip", "--policy", *policy, *FLAGS)
    assert least * EPOCHS <= summary["dropped"] <= most * EPOCHS
    assert summary["samples_dropped"] == 4 * summary["dropped"]
    assert "dropped_in_part" not in summary  # whoever computes one of them finds the same
    assert summary["samples"] + summary["samples_dropped"] == ROUNDS * 16 * EPOCHS


def test_sharded_layers_are_left_alone_in_such_a_round_too(launch: Callable[..., dict[str, Any]]) -> None:
    summary = launch("--workers", 2, "--servers", 2, "--on-nonfinite", "skip", *FLAGS, "--", "sharded")
    assert (summary["dropped"], summary["samples"]) == (4 * EPOCHS, (ROUNDS - 1) * 16 * EPOCHS)


def test_they_end_the_run_with_a_sentence_unless_they_are_allowed(tmp_path: Path) -> None:
    def run(*flags: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, LAUNCH, "local", "--overwrite", "--run-dir", tmp_path / "run", *flags, *FLAGS]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)

    for transport, who in (("auto", "server-"), ("tcp", "worker-")):  # who looks at what workers share, and at what they send
        failed = run("--transport", transport)
        assert failed.returncode == 2
        last = failed.stderr.strip().splitlines()[-1]
        found = rf"error: {who}\d failed: worker-\d's gradient of 'weight' and 'bias' in micro-batch(es)? \S+ of round 3 is not"
        assert re.match(found, last)
        assert "--on-nonfinite skip" in last
    assert run("--on-nonfinite", "allow").returncode == 0
