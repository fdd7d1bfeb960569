"""A real run whose coordinator can write nothing for a while: who looks on is told while it lasts, and nothing is lost."""

from __future__ import annotations

import resource
from collections.abc import Callable

import pytest

from benchmarks.live import TRAINING, Cluster
from roundtable.common.storage.event_log import RunLogReader

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_who_looks_on_is_told_while_the_event_log_cannot_be_written(cluster: Callable[..., Cluster]) -> None:
    run = cluster(*TRAINING, "--checkpoint-every", 0, "--epochs", 100)
    run.until(lambda: run.rounds() > 10, "tenth round")
    pid, shown = run.pids()["coordinator"], [run.shown()]
    assert "warning" not in shown[0]

    def told(text: str) -> bool:
        shown.append(run.shown())
        return text in "".join(shown)

    _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, most))  # as on a full disk, no file of its grows
    run.until(lambda: told("warning: the event log cannot be written ("), "alarm")
    rounds = run.rounds()
    run.until(lambda: told("; warning: the event log cannot be written ("), "line of progress")
    assert run.rounds() == rounds
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))
    run.until(lambda: told("warning: the event log could not be written for "), "end of the alarm")
    assert "0 rows are lost" in "".join(shown)
    found = [row.round for row in run.read(RunLogReader.rounds)]
    assert len(found) > rounds and found == list(range(len(found)))
