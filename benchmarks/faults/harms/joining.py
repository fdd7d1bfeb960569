"""Workers that join a run, and processes that come and go."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator

from benchmarks import LAUNCH, SCRIPTS
from benchmarks.faults.harms.base import LIMIT_S, Harm, slow_down
from benchmarks.faults.harms.processes import failpoints
from benchmarks.live import Cluster
from roundtable.cluster.launch.scale import scale
from roundtable.cluster.process.children import Processes
from roundtable.common.storage.event_log import RunLogReader

#: The least and most seconds between two random kills, if they go on for `_SHORT_S` at most.
_KILLS_S = (0.5, 2.0)
#: The same, if they go on for longer.
_FEWER_KILLS_S = (2.0, 10.0)
_SHORT_S = 60.0
#: How many times slower workers are when kills go on for longer.
_SLOWED = 20
#: The most seconds for which the same workers are slowed down, because others may train by then.
_LONGEST_S = 0.5
#: How many times slower workers are while others join in every round.
_CRAWLS = 200
#: Seconds between two looks at whether another round is over.
_LOOK_S = 0.1


def join(count: int, every_s: float) -> Harm:
    """Start so many workers by hand, one after another. They stay until the run ends."""

    def harm(run: Cluster) -> Cluster:
        with _joining(run, count) as start:
            for number in range(count):
                if run.is_running:
                    start(number)
                    time.sleep(every_s)
        return run

    return harm


def scale_to(workers: int) -> Harm:
    """Scale the launcher to so many workers, and wait for a failpoint."""

    def harm(run: Cluster) -> Cluster:
        scale(str(run.folder), workers)
        return failpoints(1)(run)

    return harm


def join_every_round(count: int) -> Harm:
    """Start some workers, of which one joins in every round.

    The others are slow until then, so that each round is seen by itself.
    """

    def harm(run: Cluster) -> Cluster:
        slow = _training(run)

        def crawl_until(ready: Callable[[], bool], what: str) -> None:
            deadline = time.monotonic() + LIMIT_S
            while not ready():
                assert run.is_running, f"the run ended before {what}"
                assert time.monotonic() < deadline, f"no {what} after {LIMIT_S:.0f} s"
                slow_down(run, slow, _CRAWLS, _LOOK_S)

        with _joining(run, count) as start:
            for number in range(count):
                start(number, SCRIPTS / "join_when_told.py", "--", run.folder, number)
            crawl_until(lambda: len(list(run.folder.glob("ready-*"))) == count, "all workers were ready")
            for number in range(count):
                reached = run.rounds()
                crawl_until(lambda reached=reached: run.rounds() > reached, "another round")  # type: ignore[misc]
                (run.folder / f"go-{number}").touch()
        return run

    return harm


@contextlib.contextmanager
def _joining(run: Cluster, count: int) -> Iterator[Callable[..., object]]:
    """Yield a function that starts a worker by hand, given its number, and its script if it is not the built-in example.

    The workers stay until the run ends. Raises AssertionError unless so many have joined by then.
    """
    address = (run.folder / "address").read_text().strip()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    before, command = _workers(run), [sys.executable, LAUNCH, "worker", "--coordinator", address]
    with Processes(run.folder / "by-hand", env) as processes:
        yield lambda number, *script: processes.start(f"joiner-{number}", list(map(str, [*command, *script])))
        end = time.monotonic() + LIMIT_S
        while run.is_running and time.monotonic() < end:
            time.sleep(0.1)
    joined = len(_workers(run) - before)
    assert joined == count, f"{joined} of {count} workers joined"


def _training(run: Cluster) -> list[int]:
    """Return the workers that have joined since the run began, or restarted."""
    pids: dict[str, int] = {}
    for _, _, event in run.read(RunLogReader.events) or []:
        if event.kind == "started":
            pids.clear()
        elif event.kind == "joined" and event.process.startswith("worker"):
            pids[event.process] = int(event.data["pid"])
    return [pid for name, pid in run.pids().items() if pids.get(name) == pid]


def _workers(run: Cluster) -> set[str]:
    return {event.process for event in run.events("joined") if event.process.startswith("worker")}


def churn(seconds: float) -> Harm:
    """Kill some worker, server or the coordinator every second or so.

    If that goes on for minutes, one is killed every few seconds, and workers are slow, so that the run lasts.
    """

    def harm(run: Cluster) -> Cluster:
        chance, end = random.Random(0), time.monotonic() + seconds
        while time.monotonic() < end:
            if seconds <= _SHORT_S:
                time.sleep(chance.uniform(*_KILLS_S))
            else:
                until = time.monotonic() + chance.uniform(*_FEWER_KILLS_S)
                while run.is_running and (left := until - time.monotonic()) > 0:
                    slow_down(run, _training(run), _SLOWED, min(left, _LONGEST_S))
            if not run.is_running:
                code, out = run.end()
                last = out.strip().splitlines()[-1:]
                raise AssertionError(f"the run ended {end - time.monotonic():.0f} s early with exit code {code}: {last}")
            if pids := run.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pids[chance.choice(sorted(pids))], signal.SIGKILL)
        return run

    return harm
