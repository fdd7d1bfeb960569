"""All refused messages are counted, and few are logged."""

from __future__ import annotations

import logging
import sys

import pytest

from roundtable.common.protocol.rejections import Rejections
from roundtable.common.runtime.errors import OneLine, WireError


def test_of_a_flood_all_is_counted_and_a_line_comes_every_ten_seconds_for_each_kind(caplog: pytest.LogCaptureFixture) -> None:
    refusals = Rejections(logging.getLogger("test"))
    for number in range(25_000):  # a thousand a second
        refusals.note(WireError("a message has no header", "malformed"), number / 1000, "nobody")
        if number % 10 == 0:
            refusals.note(WireError("x" * 10_000, "sender"), number / 1000)
    assert refusals.counts == {"malformed": 25_000, "sender": 2500}
    lines = [record.getMessage() for record in caplog.records]
    first = "refused from nobody: a message has no header"
    more = " (and {} more of this kind since the last line)"
    assert [line for line in lines if "header" in line] == [first, first + more.format(9999), first + more.format(9999)]
    assert [line for line in lines if "x" * 9 in line] == [
        f"refused: {'x' * 500}{text}" for text in ("", more.format(999), more.format(999))
    ]


def test_what_others_have_sent_is_one_line_of_letters_in_a_log_and_our_own_traceback_is_as_it_is() -> None:
    record = logging.LogRecord("ps", logging.ERROR, __file__, 1, "lost %s", ("\x1b[2J\nERROR ps: all is well\x07",), None)
    line = OneLine("%(levelname)s %(name)s: %(message)s").format(record)
    assert line == "ERROR ps: lost ?[2J ERROR ps: all is well?"
    try:
        raise ValueError("x")
    except ValueError:
        record.exc_info = sys.exc_info()
    assert "Traceback" in OneLine("%(message)s").format(record).splitlines()[1]
