"""Real runs of which one process, or all at once, get SIGTERM or Ctrl-C: whoever can go on does, and nothing is lost."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import LAUNCH
from benchmarks.live import TRAINING, ByHand, Cluster
from roundtable.cluster.process.children import Processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

Start = Callable[..., Cluster]
#: Long enough for something to happen in the middle.
FLAGS = (*TRAINING, "--workers", 3, "--servers", 2)


def trains(run: Cluster) -> bool:
    return run.rounds() > 20


def test_a_worker_that_is_told_to_stop_leaves_in_good_order(cluster: Start, undisturbed: str) -> None:
    run = cluster(*FLAGS)
    run.until(lambda: trains(run), "training")
    run.signal("worker-1", signal.SIGTERM)
    summary = run.summary()
    assert summary["weights_sha256"] == undisturbed and run.is_exact()
    assert "worker-1" in [event.process for event in run.events("left") if event.data.get("early")]
    assert not run.events("lost") and summary["micro_batches_recomputed"] <= 1


@pytest.mark.parametrize("copies", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_server_that_is_told_to_stop_leaves_after_a_checkpoint(cluster: Start, undisturbed: str, copies: int) -> None:
    run = cluster(*FLAGS, "--replicas", copies, "--checkpoint-every", 60)
    run.until(lambda: trains(run), "training")
    run.signal("server-1", signal.SIGTERM)
    summary = run.summary()
    assert summary["weights_sha256"] == undisturbed and run.is_exact()
    (lost,) = run.events("lost")
    assert lost.process == "server-1" and "was told to stop" in lost.data["why"]
    assert len(run.events("restarted")) == 1 - copies
    again = sum(event.data["rounds"] for event in run.events("rolled back"))
    assert again == 0 if copies else again < 20, "it went on from the beginning"


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_launchers_coordinator_that_is_told_to_stop_ends_the_run_which_goes_on(
    cluster: Start, resumed: Start, undisturbed: str, number: signal.Signals
) -> None:
    run = cluster(*FLAGS, "--checkpoint-every", 60)
    run.until(lambda: trains(run), "training")
    run.signal("coordinator", number)
    code, out = run.end()
    assert code == 128 + number and f"stopped by {number.name}" in out and "; resume the run in" in out, out
    assert resumed().summary()["weights_sha256"] == undisturbed and run.is_exact()


def test_all_processes_of_a_launcher_that_are_told_at_once_end_with_a_checkpoint(
    cluster: Start, resumed: Start, undisturbed: str
) -> None:
    run = cluster(*FLAGS, "--checkpoint-every", 60)
    run.until(lambda: trains(run), "training")
    for pid in [*run.pids().values(), run._popen.pid]:
        os.kill(pid, signal.SIGTERM)
    code, out = run.end()
    assert code == 143 and "with a checkpoint of round" in out, out
    assert resumed().summary()["weights_sha256"] == undisturbed and run.is_exact()


@pytest.mark.long
def test_processes_that_were_started_by_hand_and_are_told_at_once_end_with_a_checkpoint(
    resumed: Start, undisturbed: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with Processes(tmp_path / "logs", os.environ) as processes:
        run = ByHand(folder, processes, 2, 3, *TRAINING, "--checkpoint-every", 60)
        try:
            run.until(lambda: trains(run), "training")
            for pid in reversed(run.pids().values()):  # the coordinator last, as container engines have it
                os.kill(pid, signal.SIGTERM)
            code, out = run.end()
            assert code == 143 and "with a checkpoint of round" in out, out
            processes.poll()
            assert [child.code for child in processes.children] == [143] * 5
        finally:
            run.close()
    assert resumed().summary()["weights_sha256"] == undisturbed and run.is_exact()


@pytest.mark.long
def test_workers_and_servers_that_are_told_at_once_leave_a_run_that_goes_on_with_others(undisturbed: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Processes(tmp_path / "logs", os.environ) as processes:
        run = ByHand(folder, processes, 2, 2, *TRAINING, "--checkpoint-every", 60)
        try:
            run.until(lambda: trains(run), "training")
            for name, pid in run.pids().items():
                if name != "coordinator":
                    os.kill(pid, signal.SIGTERM)
            run.until(lambda: not any(child.popen.poll() is None for child in processes.children), "end of the others")
            processes.poll()
            assert [child.code for child in processes.children] == [143] * 4
            address = (folder / "address").read_text().strip()
            for kind in ("server", "server", "worker", "worker"):
                name = f"{kind}-again-{len(processes.children)}"
                processes.start(name, [sys.executable, str(LAUNCH), kind, "--coordinator", address])
            summary = run.summary()
        finally:
            run.close()
    assert summary["weights_sha256"] == undisturbed and run.is_exact()
    assert sum(event.data["rounds"] for event in run.events("rolled back")) < 20
