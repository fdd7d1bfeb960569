"""A small cluster that strangers attack over real sockets while it trains, in many ways at once."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from benchmarks import SCRIPTS
from benchmarks.attacks.deeds import DEEDS, joining
from benchmarks.attacks.memory import Memory
from benchmarks.attacks.strangers import ITEMS, attacking
from benchmarks.attacks.target import say, targets
from benchmarks.faults.harms.wire import ATTACK_S, MOST_GROWN
from benchmarks.live import Cluster
from roundtable.common.protocol.messages.session import Hello
from roundtable.common.protocol.transport import Stamp
from roundtable.common.storage.event_log import RunLogReader

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

FLAGS = ("--workers", 2, "--servers", 2, "--rounds", 100, "--transport", "tcp")
#: Trains 60 rounds, and the rest once there is a file `go`: so no machine is so fast that a run ends before an attack does.
SCRIPT = (SCRIPTS / "train_to_the_end.py", "wait")
#: What is refused under another kind each, and what needs little time of a small machine's processors.
CHOSEN = (
    "garbage", "oversized frames", "endless frames", "gradients of another size or type", "unknown senders", "another run's id",
    "another version of the protocol", "HTTP requests", "port scans", "slow peers", "handshakes that are never finished",
    "a message of three million frames", "headers that take long to decode", "names that were made up",
    "connections with the next one's name",
)  # fmt: skip


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of a run that nobody attacks."""
    folder = tmp_path_factory.mktemp("quiet")
    (go := folder.with_name("go")).touch()
    summary = Cluster(folder, "--run-dir", folder, *FLAGS, *SCRIPT, go).summary()
    for path in (folder, *folder.rglob("*")):
        assert not path.stat().st_mode & 0o077, f"{path} is not for its user alone"
    return summary


def test_an_attacked_run_gives_the_bits_of_an_undisturbed_one(tmp_path: Path, quiet: dict[str, Any]) -> None:
    run = Cluster(tmp_path / "loud", "--run-dir", tmp_path / "loud", *FLAGS, *SCRIPT, tmp_path / "go")
    try:
        run.until(lambda: run.rounds() > 5, "training")
        memory = Memory(run)
        with attacking([ITEMS[name] for name in CHOSEN], targets(run)):
            time.sleep(ATTACK_S)
        (tmp_path / "go").touch()
        loud = run.summary()
    finally:
        run.close()
    assert loud["weights_sha256"] == quiet["weights_sha256"]
    assert (loud["samples"], loud["dropped"]) == (quiet["samples"], quiet["dropped"])
    assert run.is_exact()
    assert loud["refused"].keys() >= {"malformed", "oversized", "flood", "sender", "run", "protocol"}
    assert not quiet["refused"]
    assert not [event for kind in ("lost", "restarted", "recovered") for event in run.events(kind)]
    assert memory.grown() < 3 * MOST_GROWN  # of all at once


def test_workers_that_join_and_do_harm_change_no_bit(tmp_path: Path, quiet: dict[str, Any]) -> None:
    run = Cluster(tmp_path / "loud", "--run-dir", tmp_path / "loud", *FLAGS, "--kv-memory", 64, *SCRIPT, tmp_path / "go")
    try:
        run.until(lambda: run.rounds() > 5, "training")
        memory = Memory(run)
        with ExitStack() as all_at_once:
            for deed in DEEDS.values():
                all_at_once.enter_context(joining(deed, targets(run)[0]))
            time.sleep(ATTACK_S)
        (tmp_path / "go").touch()
        loud = run.summary()
    finally:
        run.close()
    assert loud["weights_sha256"] == quiet["weights_sha256"]
    assert (loud["samples"], loud["dropped"], loud["rounds"]) == (quiet["samples"], quiet["dropped"], quiet["rounds"])
    assert run.is_exact() and memory.grown() < 3 * MOST_GROWN
    assert loud["refused"].keys() >= {kind for deed in DEEDS.values() for kind in deed.refused}
    assert not [event for kind in ("restarted", "recovered", "failed") for event in run.events(kind)]
    size = (run.folder / "events.sqlite").stat().st_size
    assert size < 60 << 20, f"the event log has {size >> 20} MiB"
    shown = "".join(log.read_text() for log in (run.folder / "logs").glob("*"))
    assert "\x1b" not in shown and "\x07" not in shown


@pytest.mark.long
def test_two_thousand_who_only_say_hello_are_no_members_and_a_worker_joins_all_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = Cluster(folder, "--run-dir", folder, "--workers", 2, "--servers", 2, "--epochs", 1000, "--heartbeat-timeout", 4)
    worker = None
    try:
        run.until(lambda: run.events("plan"), "training")
        memory, coordinator = Memory(run), targets(run)[0]
        for batch in range(3):
            forged = range(1000 + 700 * batch, 1000 + 700 * (batch + 1))
            hellos = [[Stamp("", "", 0, n).encode(Hello("worker", host=f"forged-{n}", pid=n))] for n in forged]
            say(coordinator.address, hellos)  # as many processes that never say anything else
            run.until(lambda batch=batch: len(run.events("joined")) >= 4 + 64 * (batch + 1), "strangers")  # type: ignore[misc]
            if batch < 2:
                run.until(lambda batch=batch: len(run.events("forgotten")) >= 64 * (batch + 1), "their end")  # type: ignore[misc]
        command = [
            sys.executable,
            str(ROOT / "launch.py"),
            "worker",
            "--coordinator",
            f"tcp://{coordinator.host}:{coordinator.port}",
        ]
        worker = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def name() -> str:
            found = {event.process for event in run.events("joined") if event.data["pid"] == worker.pid}
            return found.pop() if found else ""

        run.until(lambda: name() in {row.worker for row in run.read(RunLogReader.contributions)}, "contributions")
        assert len(run.events("joined")) == 5 + 3 * 64 and not run.events("lost")
        assert memory.grown() < MOST_GROWN
    finally:
        run.close()
        if worker is not None:
            worker.terminate()
            worker.communicate(timeout=20)
