"""Real runs whose servers keep copies of each other's shards: one that is killed costs no round, and changes no bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.live import TRAINING, Cluster
from roundtable.common.runtime.failpoints import VARIABLE

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(240)]

Start = Callable[..., Cluster]
#: With no checkpoint to fall back on.
COPIES = (*TRAINING, "--replicas", 1, "--checkpoint-every", 0)


def test_servers_that_are_killed_one_after_the_other_cost_no_round(cluster: Start, undisturbed: str) -> None:
    run = cluster(*COPIES)
    for number, name in enumerate(["server-1", "server-0"]):
        reached = run.rounds()
        run.until(lambda reached=reached: run.rounds() > reached + 20, "training")  # type: ignore[misc]
        run.signal(name)
        run.until(lambda n=number: len(joined(run)) == 3 + n, "another server")  # type: ignore[misc]
    summary = run.summary()
    assert (summary["weights_sha256"], summary["dropped"]) == (undisturbed, 0)
    assert not run.events("restarted") and run.is_exact()
    assert joined(run)[2:] == ["server-1", "server-0"]


def test_tables_and_sharded_layers_outlive_their_servers(cluster: Start) -> None:
    training = "--servers", 2, Path(__file__).with_name("train_rows.py")
    undisturbed = cluster(*training, name="undisturbed").summary()
    killed = {VARIABLE: "server-1:applied:4:kill;server-0:applied:8:kill"}
    run = cluster("--replicas", 1, "--checkpoint-every", 0, *training, env=killed)
    summary = run.summary()
    assert (summary["weights_sha256"], summary["dropped"]) == (undisturbed["weights_sha256"], 0)
    assert not run.events("restarted") and run.is_exact()
    assert joined(run)[2:] == ["server-1", "server-0"]
    without = cluster("--checkpoint-every", 0.2, *training, env={VARIABLE: "server-1:applied:8:kill"}, name="without-copies")
    assert without.summary()["weights_sha256"] == undisturbed["weights_sha256"]
    assert len(without.events("restarted")) == 1 and without.is_exact()


def joined(run: Cluster) -> list[str]:
    return [event.process for event in run.events("joined") if event.process.startswith("server")]
