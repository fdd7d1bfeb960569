"""A small cluster that strangers attack over real sockets while it trains, in many ways at once."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.attacks import ITEMS, Memory, attacking, targets
from benchmarks.harms import ATTACK_S, MOST_GROWN
from benchmarks.live import Cluster

FLAGS = ("--workers", 2, "--servers", 2, "--rounds", 100, "--lane", "socket")
#: What is refused under another kind each, and what needs little time of a small machine's processors.
CHOSEN = (
    "garbage", "oversized frames", "endless frames", "gradients of another size or type", "unknown senders", "another run's id",
    "another version of the protocol", "HTTP requests", "port scans", "slow peers", "handshakes that are never finished",
)  # fmt: skip


def test_an_attacked_run_gives_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    quiet = Cluster(tmp_path / "quiet", "--run-dir", tmp_path / "quiet", *FLAGS).summary()
    run = Cluster(tmp_path / "loud", "--run-dir", tmp_path / "loud", *FLAGS)
    try:
        run.until(lambda: run.rounds() > 5, "training")
        memory = Memory(run)
        with attacking([ITEMS[name] for name in CHOSEN], targets(run)):
            time.sleep(ATTACK_S)
        loud = run.summary()
    finally:
        run.close()
    assert loud["weights_sha256"] == quiet["weights_sha256"]
    assert (loud["samples"], loud["dropped"]) == (quiet["samples"], quiet["dropped"])
    assert run.is_exact()
    assert loud["refused"].keys() >= {"malformed", "oversized", "flood", "sender", "unfit", "run", "protocol"}
    assert not quiet["refused"]
    assert not [event for kind in ("lost", "restarted", "recovered") for event in run.events(kind)]
    assert memory.grown() < 3 * MOST_GROWN  # of all at once
