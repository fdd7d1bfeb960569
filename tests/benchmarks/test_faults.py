"""The fault matrix shows what became of a run, whatever that is."""

from __future__ import annotations

from click.testing import CliRunner

from benchmarks.faults.__main__ import cli
from benchmarks.faults.outcome import Bounds, Outcome, line


def test_a_row_that_does_not_hold_says_why() -> None:
    assert line("x", Outcome("the run hangs")) == "| x | **no**: the run hangs | | | | | | | |"
    outcome = Outcome(same=False, exact=True, noticed_s=1.26, pause_s=2.0, rounds=5, recomputed=3)
    assert line("x", outcome) == "| x | yes | **no** | yes | yes | 1.3 | 2.0 | 5 | 3 |"
    assert line("x", outcome, is_inexact=True) == "| x | yes | n/a | yes | yes | 1.3 | 2.0 | 5 | 3 |"
    assert [one.holds for one in (outcome, Outcome("hangs", True, True), Outcome("", True, True))] == [False, False, True]


def test_a_row_says_whether_it_was_within_what_is_promised() -> None:
    def told(noticed_s: float | None, pause_s: float, bounds: Bounds | None) -> str:
        return line("x", Outcome(noticed_s=noticed_s, pause_s=pause_s), bounds=bounds).split("|")[5].strip()

    dead = Bounds(3.0, 8.0)
    assert told(2.9, 7.9, dead) == told(None, 0.0, dead) == told(3.04, 8.04, dead) == "yes"  # as the table shows it
    assert told(3.06, 1.0, dead) == "**no**: noticed after 3.1 s, 3 are promised"
    assert told(0.1, 9.0, dead) == "**no**: a pause of 9.0 s, 8 are promised"
    assert told(99.0, 4.9, Bounds(None, 5.0)) == "yes"
    assert told(99.0, 99.0, None) == "n/a"


def test_a_row_that_there_is_not_is_refused() -> None:
    result = CliRunner().invoke(cli, ["--row", "no such"])
    assert result.exit_code == 2 and "there is no row 'no such'" in result.output
