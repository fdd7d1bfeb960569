"""Real runs whose workers are killed, stopped, and changed in number: the weights are those of an undisturbed run."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_going_on import has_checkpoint

from benchmarks import LAUNCH
from benchmarks.live import TRAINING, Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

Start = Callable[..., Cluster]


def names(run: Cluster, kind: str) -> list[str]:
    return [event.process for event in run.events(kind) if event.process.startswith("worker")]


def scale(run: Cluster, workers: int) -> tuple[int, str]:
    command = [sys.executable, str(LAUNCH), "scale", str(run.folder), "--workers", str(workers)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in result.stderr
    return result.returncode, result.stdout + result.stderr


def check_same(run: Cluster, expected: str) -> None:
    summary = run.summary()
    assert (summary["weights_sha256"], summary["dropped"]) == (expected, 0)
    assert not run.events("restarted")
    assert run.is_exact()


@pytest.mark.long
def test_with_all_workers_killed_others_are_started_and_go_on(cluster: Start, undisturbed: str) -> None:
    run = cluster(*TRAINING)
    run.until(lambda: run.rounds() > 10, "training")
    for name in ("worker-0", "worker-1"):
        run.signal(name)
    check_same(run, undisturbed)
    assert sorted(names(run, "joined")) == ["worker-0", "worker-1", "worker-2", "worker-3"]
    assert sorted(names(run, "left")) == ["worker-2", "worker-3"]


@pytest.mark.long
def test_a_stopped_worker_is_lost_and_joins_as_another_when_it_wakes(cluster: Start, undisturbed: str) -> None:
    run = cluster(*TRAINING, "--heartbeat-timeout", 1.5)
    run.until(lambda: run.rounds() > 10, "training")
    run.signal("worker-0", signal.SIGSTOP)
    run.until(lambda: "worker-0" in names(run, "lost"), "loss")
    run.signal("worker-0", signal.SIGCONT)
    check_same(run, undisturbed)
    assert set(names(run, "joined")) <= {"worker-0", "worker-1", "worker-2"}  # unless the others were done before it was ready


def test_a_run_ends_though_a_worker_is_stopped_for_good(cluster: Start, undisturbed: str) -> None:
    run = cluster(*TRAINING, "--heartbeat-timeout", 1.5)
    run.until(lambda: run.rounds() > 10, "training")
    run.signal("worker-1", signal.SIGSTOP)
    check_same(run, undisturbed)


def test_workers_are_added_and_taken_away_while_a_run_goes_on(cluster: Start, undisturbed: str, tmp_path: Path) -> None:
    run = cluster(*TRAINING)
    run.until(lambda: run.rounds() > 5, "training")
    assert scale(run, 1) == (0, f"{run.folder}: scaled to 1 worker.\n")
    run.until(lambda: names(run, "left") == ["worker-1"], "leaving")
    assert scale(run, 3)[0] == 0
    check_same(run, undisturbed)
    code, text = scale(run, 2)
    assert code == 2 and "is not running" in text
    assert "Traceback" not in "".join(log.read_text() for log in (tmp_path / "run" / "logs").iterdir())


@pytest.mark.long
def test_a_killed_replica_is_started_again_and_all_go_on_from_the_newest_checkpoint(cluster: Start) -> None:
    run = cluster(*TRAINING, "--policy", "local", "--epochs", 60)
    run.until(lambda: has_checkpoint(run), "checkpoint")
    run.signal("worker-1")
    assert run.summary()["dropped"] == 0
    assert len(run.events("restarted")) == 1
