"""Real runs on several hosts, which are network namespaces, and servers that nobody reaches."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import LAUNCH, network
from roundtable.common.runtime.errors import UsageError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
#: Seconds for a run to end, on a machine that others use too.
_ENDS_S = 150.0
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(*command, prefix=())` starts a command of launch.py."""
    started: list[subprocess.Popen[str]] = []

    def begin(*command: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [*prefix, sys.executable, str(LAUNCH), *map(str, command)],
                cwd=tmp_path,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        )
        return started[-1]

    yield begin
    for one in started:
        one.kill()
        one.wait()
        assert one.stdout is not None
        one.stdout.close()


@pytest.fixture
def hosts() -> Iterator[list[network.Host]]:
    try:
        made = network.hosts("1gbit")
        two = made.__enter__()
    except (UsageError, OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no hosts can be made here: {error}")
    yield two
    made.__exit__(None, None, None)


def test_a_server_that_finds_the_coordinator_by_loopback_is_reached_from_another_host(
    start: Start, hosts: list[network.Host], tmp_path: Path
) -> None:
    near, far = (host.prefix for host in hosts)
    flags = ("--workers", 1, "--servers", 1, "--model", "mlp", "--data", "digits", "--rounds", 5, "--run-dir", tmp_path / "run")
    run = [
        start("coordinator", *flags, prefix=near),
        start("server", "--coordinator", "tcp://127.0.0.1:5555", prefix=near),
        start("worker", "--coordinator", f"tcp://{hosts[0].address}:5555", prefix=far),
    ]
    told = [process.communicate(timeout=_ENDS_S)[0] for process in run]
    assert [process.returncode for process in run] == [0, 0, 0], told
    assert (tmp_path / "run" / "address").read_text() == f"tcp://{hosts[0].address}:5555\n"


def test_a_server_that_listens_for_its_own_host_only_and_a_worker_elsewhere_are_told_apart(
    start: Start, hosts: list[network.Host], tmp_path: Path
) -> None:
    near, far = (host.prefix for host in hosts)
    coordinator = start("coordinator", "--workers", 1, "--servers", 1, "--run-dir", tmp_path / "run", prefix=near)
    run = [
        start("server", "--coordinator", "tcp://127.0.0.1:5555", "--listen", "tcp://127.0.0.1:0", prefix=near),
        start("worker", "--coordinator", f"tcp://{hosts[0].address}:5555", prefix=far),
    ]
    while all(process.poll() is None for process in run):
        assert coordinator.poll() is None
        time.sleep(0.05)
    refused = next(process for process in run if process.poll() is not None)
    assert refused.returncode == 2 and "tells others to reach it at tcp://127.0.0.1:" in refused.communicate()[0]


def test_a_server_that_cannot_be_reached_is_named_with_its_address_and_not_the_workers_blamed(
    start: Start, tmp_path: Path
) -> None:
    flags = (
        "--workers",
        1,
        "--servers",
        1,
        "--progress-timeout",
        6,
        "--listen",
        "tcp://127.0.0.1:0",
        "--run-dir",
        tmp_path / "run",
    )
    coordinator = start("coordinator", *flags)
    while not (tmp_path / "run" / "address").exists():
        assert coordinator.poll() is None
        time.sleep(0.05)
    address = (tmp_path / "run" / "address").read_text().strip()
    others = [
        start("server", "--coordinator", address, "--advertise", "127.0.0.1:9"),
        start("worker", "--coordinator", address),
    ]
    told, server, worker = (process.communicate(timeout=_ENDS_S)[0] for process in (coordinator, *others))
    assert "cannot reach server-0 on" in told and "at tcp://127.0.0.1:9: see its --listen and --advertise" in told
    assert told.strip().splitlines()[-1].startswith("error: ") and "cannot reach" in told.strip().splitlines()[-1]
    assert "there is no connection to server-0 at tcp://127.0.0.1:9 from " in worker
    assert "Traceback" not in told + server + worker and "Exception ignored" not in worker
    assert [process.returncode for process in (coordinator, *others)] == [1, 1, 1]
