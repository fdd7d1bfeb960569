"""docker-compose.yml for real: six containers train to the weights of a local run, though a worker and a server are lost.

Skips where there is no Docker engine or no docker-compose.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from roundtable.common.storage.event_log import FILE_NAME, RunLogReader

# An image that is not there yet is built, which fetches torch: two minutes on an idle machine, more on a busy one or a slow line.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
PROJECT = f"roundtable-test-{os.getpid()}"
NAMES = {"coordinator-1", "server-1", "server-2", "worker-1", "worker-2", "worker-3"}
COUNT_ROUNDS = """
import sqlite3
log = sqlite3.connect("file:/runs/compose/events.sqlite?mode=ro", uri=True)
print(log.execute("SELECT count(*) FROM rounds").fetchone()[0])
"""

Launch = Callable[..., dict[str, Any]]


def succeeds(*command: str) -> bool:
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0


def run(*command: str, **env: str) -> str:
    result = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


class Cluster:
    """The containers of one `docker-compose up`."""

    def __init__(self, compose: tuple[str, ...]) -> None:
        self._compose = (*compose, "-p", PROJECT)

    def up(self, *flags: str) -> None:
        """Build, start and return; `flags` are the coordinator's."""
        scale = ("--scale", "worker=3", "--scale", "server=2")
        run(*self._compose, "up", "--build", "-d", *scale, WORKERS="3", SERVERS="2", ARGS=" ".join(flags))

    def stop(self) -> None:
        run(*self._compose, "stop")

    def containers(self) -> dict[str, dict[str, Any]]:
        """The engine's facts on each container, by service and number such as worker-2, running or ended."""
        ids = run("docker", "ps", "-aq", "--filter", f"label=com.docker.compose.project={PROJECT}").split()
        found = json.loads(run("docker", "inspect", *ids))
        labels = [{key.rpartition(".")[2]: value for key, value in one["Config"]["Labels"].items()} for one in found]
        return {f"{label['service']}-{label['container-number']}": one for label, one in zip(labels, found, strict=True)}

    def wait(self) -> dict[str, int]:
        """The exit codes, when all have ended."""
        containers = self.containers()
        codes = run("docker", "wait", *(one["Id"] for one in containers.values())).split()
        return dict(zip(containers, map(int, codes), strict=True))

    def rounds(self) -> int:
        """How many rounds are over; 0 before there is an event log, too."""
        command = ("docker", "exec", self.containers()["coordinator-1"]["Id"], "python", "-c", COUNT_ROUNDS)
        result = subprocess.run(command, capture_output=True, text=True)
        return int(result.stdout) if result.returncode == 0 else 0

    def results(self, folder: Path) -> dict[str, Any]:
        """Copy the run directory out of the volume to `folder` and return the summary."""
        run("docker", "cp", f"{self.containers()['coordinator-1']['Id']}:/runs/compose", str(folder))
        return dict(json.loads((folder / "summary.json").read_text()))

    def down(self) -> None:
        """Print what the containers said, which shows where a test has failed, and leave nothing of them."""
        print(run(*self._compose, "logs", "--no-color", "--tail", "50"))
        run(*self._compose, "down", "--volumes")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    if not succeeds("docker", "info"):
        pytest.skip("no Docker engine can be reached")
    kinds = [("docker-compose",), ("docker", "compose")]
    compose = next((kind for kind in kinds if succeeds(*kind, "version")), None)
    if compose is None:
        pytest.skip("there is no docker-compose")
    cluster = Cluster(compose)
    try:
        yield cluster
    finally:
        cluster.down()


def sha256(model: Path) -> str:
    digest = hashlib.sha256()
    for _, parameter in sorted(load_file(model).items()):
        digest.update(parameter.tobytes())
    return digest.hexdigest()


def joined(folder: Path) -> dict[str, dict[str, Any]]:
    with contextlib.closing(RunLogReader(folder / FILE_NAME)) as log:
        return {event.process: event.data for _, _, event in log.events() if event.kind == "joined"}


def test_of_six_containers_a_worker_is_killed_and_a_server_crashes_and_the_rest_train_to_the_weights_of_a_local_run(
    cluster: Cluster, launch: Launch, tmp_path: Path
) -> None:
    flags = ("--data", "digits", "--epochs", "8", "--lr", "0.05")
    cluster.up(*flags, "--replicas", "1")
    containers = cluster.containers()
    hosts = {name: one["Config"]["Hostname"] for name, one in containers.items()}
    assert len(set(hosts.values())) == 6
    for one in containers.values():
        assert set(one["NetworkSettings"]["Networks"]) == {f"{PROJECT}_cluster"}
        assert not one["HostConfig"]["PortBindings"]
    for name, one in containers.items():
        users = run("docker", "top", one["Id"], "-eo", "pid,uid").split()[3::2]
        assert users and "0" not in users, f"{name} runs as root"
        limits = one["HostConfig"]
        assert limits["ReadonlyRootfs"] and limits["CapDrop"] == ["ALL"], name
        assert limits["Memory"] > 0 and limits["PidsLimit"] > 0, name
        written = ["docker", "exec", one["Id"], "touch", "/tmp/new", "/home/trainer/new"]
        assert "/home/trainer/new" in (told := subprocess.run(written, capture_output=True, text=True).stderr), name
        assert "Read-only file system" in told and "/tmp/new" not in told, told
    while (rounds := cluster.rounds()) < 5:
        assert cluster.containers()["coordinator-1"]["State"]["Running"]
    run("docker", "exec", containers["server-1"]["Id"], "sh", "-c", "kill -9 -1")  # all but its init: it is started again
    run("docker", "kill", containers["worker-2"]["Id"])
    assert cluster.wait() == dict.fromkeys(NAMES, 0) | {"worker-2": 137}

    found = cluster.results(tmp_path / "volume")
    members = joined(tmp_path / "volume")
    assert {data["host"] for data in members.values()} == {hosts[name] for name in NAMES - {"coordinator-1"}}
    assert rounds < found["rounds"] and found["samples"] == 8 * 1437
    assert {name: one["RestartCount"] for name, one in cluster.containers().items()} == dict.fromkeys(NAMES, 0) | {"server-1": 1}
    local = launch("--workers", 3, "--servers", 2, *flags)
    builds = members["worker-0"]["arithmetic"], joined(tmp_path / "run")["worker-0"]["arithmetic"]
    assert found["weights_sha256"] == local["weights_sha256"] == sha256(tmp_path / "volume" / "model.safetensors"), builds


@pytest.mark.long
def test_up_after_an_edit_goes_on_with_the_run_and_deletes_nothing(cluster: Cluster, launch: Launch, tmp_path: Path) -> None:
    flags = ("--data", "digits", "--lr", "0.05", "--checkpoint-every", "1")
    cluster.up(*flags, "--epochs", "9")
    while cluster.rounds() < 10:
        assert cluster.containers()["coordinator-1"]["State"]["Running"]
    cluster.stop()  # workers and servers before the coordinator
    assert {one["State"]["ExitCode"] for one in cluster.containers().values()} == {143}
    cluster.up(*flags, "--epochs", "10")
    assert cluster.wait() == dict.fromkeys(NAMES, 0)

    found = cluster.results(tmp_path / "volume")
    with contextlib.closing(RunLogReader(tmp_path / "volume" / FILE_NAME)) as log:
        back = [event.data["to"] for _, _, event in log.events() if event.kind == "rolled back"]
    assert back and min(back) >= 10 and found["samples"] == 10 * 1437

    began = time.monotonic()
    cluster.up(*flags, "--epochs", "10")
    assert cluster.wait() == dict.fromkeys(NAMES, 0)
    assert time.monotonic() < began + 120.0, "somebody waits for a run that has finished"
    assert cluster.results(tmp_path / "again")["weights_sha256"] == found["weights_sha256"]
    assert all(one["RestartCount"] == 0 for one in cluster.containers().values())
