"""The functions for the end of a round: their order, which rounds they are due for, and what they may not do."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from test_run import run

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.loop.gradient_loop import GradientLoop
from roundtable.worker.loop.script_batch import RoundHooks
from roundtable.worker.loop.weight_fetcher import WeightFetcher
from roundtable.worker.optim.round_settings import RoundSettings


def test_they_are_called_in_order_each_with_a_check_after_it() -> None:
    hooks, calls = RoundHooks(), []

    def first() -> None:
        assert hooks.running
        calls.append("first")

    hooks.add(first, 4)
    hooks.add(lambda: calls.append("second"), 4)
    assert not hooks.due(4) and hooks.due(5)
    hooks.call(5, calls.append)
    assert calls == ["first", "first() of run.on_round()", "second", "<lambda>() of run.on_round()"]
    assert not hooks.running and not hooks.due(5) and hooks.due(6)


def test_one_that_is_registered_within_a_round_is_first_called_at_its_end() -> None:
    hooks = RoundHooks()
    assert not hooks.due(7)
    hooks.add(lambda: hooks.add(late, 8), 7)
    late = Mock(__name__="late")
    hooks.call(8, lambda whose: None)
    late.assert_not_called()
    hooks.call(9, lambda whose: None)
    late.assert_called_once_with()


def test_missed_rounds_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    hooks = RoundHooks()
    hooks.add(lambda: None, 2)
    hooks.call(3, lambda whose: None)
    assert not caplog.records
    hooks.miss(5)
    assert not hooks.due(5)
    for round_ in (6, 9):
        hooks.call(round_, lambda whose: None)
    assert "before the call with run.round 6, the functions of run.on_round() have missed 2 rounds" in caplog.text
    assert len(caplog.records) == 1


def test_a_function_that_fails_is_running_no_longer() -> None:
    hooks = RoundHooks()
    hooks.add(lambda: 1 / 0, 0)
    with pytest.raises(ZeroDivisionError):
        hooks.call(1, lambda whose: None)
    assert not hooks.running


@pytest.mark.parametrize("gone", [False, True])
def test_they_are_not_called_with_weights_that_servers_may_have_written_over(gone: bool) -> None:
    steps: list[str] = []
    fetcher = object.__new__(WeightFetcher)
    io = SimpleNamespace(lock=contextlib.nullcontext(), send=lambda *messages: steps.append("asked"))
    fetcher._context = SimpleNamespace(io=io, wait=lambda ready, what: ready())  # type: ignore[assignment]
    fetcher._client = Mock(complete=not gone, gone=gone, **{"ask_for.return_value": []})
    fetcher._replica = Mock(**{"layout.chunks": [], "copy_from_servers.side_effect": lambda: steps.append("copied")})
    fetcher._lazy, fetcher.round_invalid = Mock(any=False), False
    loop = object.__new__(GradientLoop)
    loop.round, loop._per_round, loop._weights, loop.hooks = 6, True, fetcher, RoundHooks()
    loop.replica, loop._settings, loop._contributor, loop.edits = Mock(), Mock(), Mock(), Mock(**{"lost.return_value": []})
    loop.hooks.add(lambda: steps.append("called"), 5)
    loop._end_round()
    assert steps == ["copied", "asked", "called"][: 2 if gone else 3]
    assert fetcher.round_invalid == gone and not loop.hooks.due(6)


def test_it_needs_an_optimizer_and_may_be_a_decorator() -> None:
    with pytest.raises(UsageError, match=r"line \d+: run.on_round\(\) needs an optimizer"):
        run().on_round(lambda: None)
    work = SimpleNamespace(hooks=RoundHooks(), round=3)

    @run(training=SimpleNamespace(work=work)).on_round
    def ends() -> None: ...

    assert work.hooks.functions == [ends] and work.hooks.due(4) and not work.hooks.due(3)


def test_what_it_sets_counts_from_the_next_round_on_even_if_this_worker_computed_nothing() -> None:
    def settings() -> RoundSettings:
        groups: list[dict[str, Any]] = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.5}]
        return RoundSettings(groups)

    computes, idles = settings(), settings()
    assert computes.begin(0, 0)
    computes.used(0)
    for one in (computes, idles):
        one.end_round(1)
        one.groups[0]["lr"] = 0.25
        assert one.begin(1, 0)
        assert one.groups[0]["lr"] == 0.25
        one.used(1)
        assert one.at(1, 0) == [{"lr": 0.25}]
        assert not one.set_before_step
