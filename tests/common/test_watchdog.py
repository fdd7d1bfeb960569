"""Stacks are dumped once per stall, and not while there is progress or nothing to do."""

from __future__ import annotations

import subprocess
import sys

from roundtable.common.runtime.watchdog import Watchdog


def test_stacks_are_dumped_once_per_stall() -> None:
    seen: list[int | None] = [1]
    dog = Watchdog(0.0, lambda: seen[0], lambda: "nobody")  # without its thread
    dog._seconds = 10.0
    assert [dog.look(now) for now in (0.0, 9.0, 10.5, 11.0, 30.0)] == [False, False, True, False, False]
    seen[0] = 2
    assert [dog.look(now) for now in (31.0, 40.0, 42.0, 60.0)] == [False, False, True, False]
    seen[0] = None  # nothing is going on
    assert [dog.look(now) for now in (61.0, 100.0)] == [False, False]


def test_the_log_says_what_is_waited_for_and_where_every_thread_is() -> None:
    script = (
        "import logging, time; from roundtable.common.runtime.watchdog import Watchdog; logging.basicConfig()\n"
        "def stuck(): time.sleep(1.5)\n"
        "dog = Watchdog(0.4, lambda: 1, lambda: 'the weights of round 3 from server-1'); stuck(); dog.stop()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.count("waiting for the weights of round 3 from server-1") == 1
    assert "in stuck" in done.stderr and done.stderr.count("in stuck") == 1
