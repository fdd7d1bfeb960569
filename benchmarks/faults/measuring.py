"""Start a run, do harm to it, and find its outcome."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

from benchmarks.faults import spread
from benchmarks.faults.harms import disk
from benchmarks.faults.outcome import Outcome
from benchmarks.faults.row import HOUR_S, SERVERS, WORKERS, Row
from benchmarks.live import ByHand, Cluster
from roundtable.cluster.process.children import Processes
from roundtable.common.runtime.failpoints import MARK, VARIABLE
from roundtable.common.storage.event_log import RunLogReader

#: Rounds before the harm.
_ROUNDS = 20
#: Events that show that a fault was noticed.
_NOTICED = ("lost", "joined", "restarted", "recovered", "rolled back", "refused", "warning")


def measure(row: Row, expected: str, folder: Path) -> Outcome:
    """Start a run, do the harm in the middle of it, and return the outcome. `expected` is the hash of its weights."""
    flags = row.training
    if row.network is not None or row.delay_s:
        with spread.hosts(folder.with_name(f"{folder.name}-logs")) as (made, processes):
            if row.delay_s:
                spread.delay(made, processes, row.delay_s)
            near = 0 if row.delay_s else WORKERS - 1
            run = row.scene(folder, processes, made, SERVERS, near, WORKERS - near, *flags)
            return _look(run, row, expected, lambda _: row.network and row.network(run))
    if row.by_hand:
        env = {**os.environ, **row.env, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with Processes(folder.with_name(f"{folder.name}-logs"), env) as processes:
            by_hand = ByHand(folder, processes, SERVERS, WORKERS, *flags, env=row.env, bind=row.bind)
            return _look(by_hand, row, expected)
    with disk.small_disk(folder) if row.on_small_disk else nullcontext(folder) as place:
        size = ("--workers", WORKERS, "--servers", row.servers)
        return _look(Cluster(place, "--run-dir", place, *flags, *size, *row.script, env=row.env), row, expected)


def _look(run: Cluster, row: Row, expected: str, first: Callable[[Cluster], object] = lambda run: None) -> Outcome:
    try:
        run.until(lambda: run.rounds() > _ROUNDS or list(run.folder.glob(f"{MARK}*")), "training")
        if VARIABLE not in row.env and not row.delay_s:
            run.until(lambda: run.events("checkpoint"), "checkpoint")
        began, harmed = time.time(), run
        first(run)
        run = row.harm(run)
        began = harmed.harmed_at or began
        summary = run.summary() if not row.fails else {}
        if missing := sorted(set(row.refused) - set(summary.get("refused", ()))):
            return Outcome(f"nothing was refused as '{missing[0]}'; as refused counted {summary['refused']}")
    except AssertionError as error:
        return Outcome(str(error).strip().splitlines()[0])
    except (KeyError, ProcessLookupError) as error:
        return Outcome(f"the harness found no process to harm: {error}")
    finally:
        run.close()
        left = run.left_behind()
        for pid in left.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    if left:
        return Outcome(f"left behind: {', '.join(left)}")
    began = min((mark.stat().st_mtime for mark in run.folder.glob(f"{MARK}*")), default=began)

    def since(at: float) -> float:
        """Return the seconds from `began` to `at`, also if the clock was moved by an hour in between."""
        return (at - began + HOUR_S / 2) % HOUR_S - HOUR_S / 2

    events = [(since(at), event) for _, at, event in run.read(RunLogReader.events)]
    committed = run.read(RunLogReader.rounds)
    times = [0.0, *(at for committed_ in committed if (at := since(committed_.at)) > 0)]
    return Outcome(
        same=row.is_inexact or summary["weights_sha256"] == expected,
        exact=run.is_exact() and (row.fails or len(committed) == summary.get("merges", summary["rounds"])),
        noticed_s=min((at for at, event in events if at >= 0 and event.kind in _NOTICED), default=None),
        pause_s=max((b - a for a, b in itertools.pairwise(times)), default=0.0),
        rounds=sum(event.data["rounds"] for _, event in events if event.kind == "rolled back"),
        recomputed=summary.get("micro_batches_recomputed", 0),
    )
