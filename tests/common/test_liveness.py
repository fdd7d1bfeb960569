"""A process that hangs is told from one that is slow, restarts, or was not listened to."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import pytest

from roundtable.common.protocol import liveness


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[liveness.Listener, liveness.Signs]]:
    with contextlib.closing(liveness.Listener()) as listener:
        monkeypatch.setenv(liveness.VARIABLE, str(listener.write))
        yield listener, liveness.Signs()


def hangs_after(listener: liveness.Listener, seconds: float) -> bool:
    """Whether it is taken to hang at any look until then, ten of which there are each second."""
    begun = time.monotonic()
    return any([listener.hangs(begun + tick / 10) for tick in range(round(seconds * 10) + 1)])


def test_one_that_falls_silent_hangs_after_the_time_it_named(pipe: tuple[liveness.Listener, liveness.Signs]) -> None:
    listener, signs = pipe
    signs.give(4.0)
    assert not hangs_after(listener, 3.9)
    assert hangs_after(listener, 4.2)


def test_one_that_has_not_begun_or_begins_anew_may_take_its_time(pipe: tuple[liveness.Listener, liveness.Signs]) -> None:
    listener, signs = pipe
    assert not hangs_after(listener, 100)
    signs.give(1.0)
    signs.pause()
    assert not hangs_after(listener, 100)
    listener.begins()
    assert not hangs_after(listener, 100)


def test_nobody_hangs_whose_starter_was_stopped_itself(pipe: tuple[liveness.Listener, liveness.Signs]) -> None:
    listener, signs = pipe
    signs.give(4.0)
    now = time.monotonic()
    assert not listener.hangs(now)
    assert not listener.hangs(now + 60)
    assert not listener.hangs(now + 60.9)


def test_signs_that_nobody_reads_stop_nobody(
    pipe: tuple[liveness.Listener, liveness.Signs], monkeypatch: pytest.MonkeyPatch
) -> None:
    listener, signs = pipe
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(listener.write, bytes(1 << 12))
    signs.give(4.0)
    monkeypatch.delenv(liveness.VARIABLE)
    liveness.Signs().give(4.0)  # of one that was started by hand
