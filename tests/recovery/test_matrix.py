"""A few rows of the fault matrix: a process is killed at a named point, and weights and books are those of an undisturbed run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults import measure, rows

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize(
    "name",
    ["a worker, at receiving", "a server, at applying", "the coordinator, at flushed", "all workers, each at another point"],
)
def test_a_run_whose_process_is_killed_there_ends_as_if_nothing_had_happened(undisturbed: str, tmp_path: Path, name: str) -> None:
    outcome = measure(rows(1.0, tmp_path)[name], undisturbed, tmp_path / "run")
    assert (outcome.problem, outcome.same, outcome.exact) == ("", True, True)
