"""A few rows of the fault matrix, of which weights and event log are those of an undisturbed run: a process is killed at a named
point, or messages do not come as they were sent.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.faults.measuring import measure
from benchmarks.faults.rows import rows

pytestmark = pytest.mark.timeout(240)
LONG = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("a worker, at receiving", marks=LONG),
        "a server, at applying",
        pytest.param("the coordinator, at flushed", marks=LONG),
        pytest.param("all workers, each at another point", marks=LONG),
        pytest.param("6 servers for 4 chunks, power loss, then --resume on 3", marks=LONG),
        pytest.param("a worker's script fails, and --worker-failures admits it", marks=LONG),
    ],
)
def test_a_run_whose_process_is_killed_there_ends_as_if_nothing_had_happened(undisturbed: str, tmp_path: Path, name: str) -> None:
    outcome = measure(rows(1.0, tmp_path)[name], undisturbed, tmp_path / "run")
    assert (outcome.problem, outcome.same, outcome.exact) == ("", True, True)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            "strangers: messages of an earlier epoch once more, and of a worker that was lost",
            marks=LONG,
        ),
        pytest.param("messages sent twice, and after later ones", marks=LONG),
    ],
)
def test_messages_that_come_again_late_or_in_another_order_change_nothing(undisturbed: str, tmp_path: Path, name: str) -> None:
    row = replace(rows(1.0, tmp_path)[name], flags=("--transport", "tcp"))  # the bits are those of any transport
    outcome = measure(row, undisturbed, tmp_path / "run")
    assert (outcome.problem, outcome.same, outcome.exact) == ("", True, True)
