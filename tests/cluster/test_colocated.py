"""Workers with a server beside them, started by hand as on several machines."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import START_S, Launched, wait_for_ends

from roundtable.common.storage.event_log import FILE_NAME, RunLogReader

pytestmark = pytest.mark.slow

LAUNCH = Path(__file__).parents[2] / "launch.py"
Start = Callable[..., Launched]

#: Trains until it is stopped, and says when it does.
ENDLESS = """
import os
import torch
import roundtable

run = roundtable.join()
model = run.replicate(torch.nn.Linear(8, 4))
opt = run.optimizer(torch.optim.SGD, lr=0.1)
data = torch.utils.data.TensorDataset(torch.ones(640, 8), torch.zeros(640, dtype=torch.int64))
for number, (x, y) in enumerate(run.batches(data, epochs=10**6)):
    torch.nn.functional.cross_entropy(model(x), y).backward()
    opt.step()
    if number == 2:
        with open(os.environ["STUB_READY"], "w") as ready:
            ready.write(f"{run.name} {os.getpid()}\\n")
"""


class Cluster:
    """A coordinator for so many workers and servers, and the workers that were started."""

    def __init__(self, start: Start, folder: Path, workers: int, servers: int, *flags: object) -> None:
        sizes = ("--workers", workers, "--servers", servers, "--listen", "tcp://127.0.0.1:0", "--run-dir", "run")
        (folder / "endless.py").write_text(ENDLESS)
        self.coordinator = start(LAUNCH, "coordinator", *sizes, *flags)
        assert self.coordinator.popen.stdout is not None
        self._address = self.coordinator.popen.stdout.readline().rpartition(" ")[2].strip()
        self._start, self._log = start, folder / "run" / FILE_NAME

    def worker(self, *args: object) -> Launched:
        """Start a worker with a server beside it."""
        return self._start(LAUNCH, "worker", "--coordinator", self._address, "--colocate", *args)

    def pids(self) -> dict[str, int]:
        """Of the four that have joined, once that is written down."""
        self.until(lambda: len(self._joined()) >= 4)
        return self._joined()

    def _joined(self) -> dict[str, int]:
        with contextlib.closing(RunLogReader(self._log)) as log:
            return {event.process: int(event.data["pid"]) for _, _, event in log.events() if event.kind == "joined"}

    def rounds(self) -> int:
        with contextlib.closing(RunLogReader(self._log)) as log:
            return len(log.rounds())

    def until(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not ready():
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def two(start: Start, tmp_path: Path) -> tuple[Cluster, list[Launched]]:
    """A run of two such workers, which train until something happens; a server is started again once."""
    cluster = Cluster(start, tmp_path, 2, 2, "--replicas", 1)
    workers = [cluster.worker("--index", index, "--max-restarts", 1, "endless.py") for index in range(2)]
    for worker in workers:
        worker.ready(1)
    return cluster, workers


def test_workers_with_servers_beside_them_are_a_whole_run_and_leave_nothing(start: Start, tmp_path: Path) -> None:
    cluster = Cluster(start, tmp_path, 2, 2, "--data", "digits", "--rounds", 5)
    workers = [cluster.worker(), cluster.worker()]
    for worker in workers:
        code, lines = worker.end(START_S)
        assert code == 0 and any("this is server-" in line for line in lines), lines
        worker.leaves_nothing(set())
    assert cluster.coordinator.end(START_S)[0] == 0
    assert set(cluster.pids()) == {"server-0", "server-1", "worker-0", "worker-1"}


def test_a_killed_worker_takes_the_server_beside_it_along_and_no_other(two: tuple[Cluster, list[Launched]]) -> None:
    cluster, (first, second) = two
    pids, everybody = cluster.pids(), second.members()
    assert pids["server-1"] in everybody
    os.kill(pids["worker-1"], signal.SIGKILL)
    wait_for_ends(everybody - {second.popen.pid})
    assert second.end()[0] == -signal.SIGKILL
    second.leaves_nothing(set())
    assert {pids["worker-0"], pids["server-0"]} <= first.members()


def test_a_killed_server_is_started_again_and_when_that_is_too_often_fails_its_worker_and_with_it_the_run(
    two: tuple[Cluster, list[Launched]],
) -> None:
    cluster, (first, second) = two
    before = cluster.pids()
    os.kill(before["server-1"], signal.SIGKILL)
    cluster.until(lambda: cluster.pids()["server-1"] != before["server-1"])
    assert set(cluster.pids()) == set(before) and cluster.pids()["server-1"] in second.members()
    rounds = cluster.rounds()
    cluster.until(lambda: cluster.rounds() > rounds + 1)
    os.kill(cluster.pids()["server-1"], signal.SIGKILL)
    sentence = "the server beside this worker was killed by signal 9 (SIGKILL)."
    ends = [one.end() for one in (second, cluster.coordinator, first)]
    assert [code for code, _ in ends] == [1, 1, 1]
    lasts = [lines[-1] for _, lines in ends]
    assert lasts[0] == f"error: {sentence}" and lasts[1] == f"error: worker-1 on {platform.node()} failed: {sentence}"
    assert lasts[2] == f"error: stopped because worker-1 on {platform.node()} failed: {sentence}"
    first.leaves_nothing(set())
    second.leaves_nothing(set())


@pytest.mark.long
def test_a_server_that_hangs_is_killed_by_the_worker_that_started_it_and_another_takes_its_place(
    start: Start, tmp_path: Path
) -> None:
    cluster = Cluster(start, tmp_path, 2, 2, "--replicas", 1, "--heartbeat-timeout", 4)
    for worker in (workers := [cluster.worker("--index", index, "endless.py") for index in range(2)]):
        worker.ready(1)
    before = cluster.pids()
    os.kill(before["server-1"], signal.SIGSTOP)
    cluster.until(lambda: cluster.pids()["server-1"] != before["server-1"])
    assert cluster.pids()["server-1"] in workers[1].members()
    assert before["server-1"] not in workers[1].members()
    rounds = cluster.rounds()
    cluster.until(lambda: cluster.rounds() > rounds + 1)
    assert before["worker-1"] == cluster.pids()["worker-1"]


def test_where_there_are_more_such_workers_than_servers_wanted_the_last_one_is_told(start: Start, tmp_path: Path) -> None:
    cluster = Cluster(start, tmp_path, 2, 1)
    workers = [cluster.worker("endless.py") for _ in range(2)]
    deadline = time.monotonic() + START_S
    while all(worker.popen.poll() is None for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    code, lines = min((worker for worker in workers), key=lambda worker: worker.popen.poll() is None).end()
    assert code == 2 and re.fullmatch(
        r"error: the server beside this worker failed: run \w+ already has its 1 servers \(--servers 1 of the coordinator\)\.",
        lines[-1],
    )


def test_a_script_that_is_not_there_is_noticed_before_a_server_joins(start: Start, tmp_path: Path) -> None:
    cluster = Cluster(start, tmp_path, 1, 1)
    code, lines = cluster.worker("nothing.py").end(START_S)
    assert (code, lines) == (2, ["error: there is no script nothing.py."])


def test_a_worker_that_is_told_to_stop_leaves_with_the_server_beside_it(two: tuple[Cluster, list[Launched]]) -> None:
    cluster, (first, second) = two
    rounds = cluster.rounds()
    os.kill(second.popen.pid, signal.SIGTERM)
    code, lines = second.end(START_S)
    assert code == 143, lines
    second.leaves_nothing(set())
    newcomer = cluster.worker("endless.py")
    newcomer.ready(1)
    assert cluster.rounds() >= rounds, "it began again from the beginning"
    assert first.popen.poll() is None


def test_a_script_that_ends_early_leaves_its_server_to_the_others(start: Start, tmp_path: Path) -> None:
    cluster = Cluster(start, tmp_path, 2, 2, "--rounds", 40)
    (tmp_path / "leaves.py").write_text(
        ENDLESS.replace("    opt.step()\n", "    opt.step()\n    if number == 2:\n        break\n")
    )
    leaver, other = cluster.worker("--index", 1, "leaves.py"), cluster.worker("--index", 0, "endless.py")
    other.ready(1)
    for one in (other, leaver, cluster.coordinator):
        code, lines = one.end(START_S)
        assert code == 0, lines
        one.leaves_nothing(set())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["left_early"]) == ["worker-1"] and summary["rounds"] == 40
    assert len(summary["weights_sha256"]) == 64
