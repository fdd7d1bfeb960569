"""The fault matrix shows what became of a run, whatever that is."""

from __future__ import annotations

from click.testing import CliRunner

from benchmarks.faults import Outcome, cli, line


def test_a_row_that_does_not_hold_says_why() -> None:
    assert line("x", Outcome("the run hangs")) == "| x | **no**: the run hangs | | | | | | |"
    outcome = Outcome(same=False, exact=True, noticed_s=1.26, pause_s=2.0, rounds=5, recomputed=3)
    assert line("x", outcome) == "| x | yes | **no** | yes | 1.3 | 2.0 | 5 | 3 |"
    assert line("x", outcome, is_inexact=True) == "| x | yes | n/a | yes | 1.3 | 2.0 | 5 | 3 |"
    assert [one.holds for one in (outcome, Outcome("hangs", True, True), Outcome("", True, True))] == [False, False, True]


def test_a_row_that_there_is_not_is_refused() -> None:
    result = CliRunner().invoke(cli, ["--row", "no such"])
    assert result.exit_code == 2 and "there is no row 'no such'" in result.output
