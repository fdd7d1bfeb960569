"""How many connections a process may have."""

from __future__ import annotations

import resource

import pytest

from common.errors import UsageError
from common.wire import allow_files


def test_the_limit_of_open_files_is_raised_only_as_far_as_need_be(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda what, limits: asked.append(limits))
    allow_files(100)
    assert asked == []
    allow_files(1000)
    assert len(asked) == 1 and 1000 < asked[0][0] < 2000 and asked[0][1] == 4096


def test_a_limit_that_cannot_be_raised_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(what: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    with pytest.raises(UsageError, match=r"^a process here needs \d+ open files .*, and the system allows 4096: "):
        allow_files(10_000)
