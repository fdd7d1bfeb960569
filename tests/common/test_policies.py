"""Each policy is its row in the design's table: when servers apply, and when a worker goes on."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roundtable.common.config.batch_plan import Segment, make_segment
from roundtable.common.config.settings import PolicyName, Settings
from roundtable.common.policies import Policy, load

clocks = st.integers(0, 100)
ALL = get_args(PolicyName)


def policy(name: str, **more: Any) -> Policy:
    return load(Settings(policy=name, **more))  # type: ignore[arg-type]


TABLE = {
    # policy: (contributes, applies, combines, is_local)
    "sync": ("gradient", "round", True, False),
    "backup": ("gradient", "round", False, False),
    "ssp": ("gradient", "push", False, False),
    "async": ("gradient", "push", False, False),
    "local": ("delta", "round", True, True),
    "average": ("weights", "round", True, True),
}


@pytest.mark.parametrize("name", ALL)
def test_what_is_sent_and_when_it_is_applied(name: str) -> None:
    p = policy(name)
    assert (p.contributes, p.applies, p.combines, p.is_local) == TABLE[name]


def test_a_policy_is_one_file_found_by_name() -> None:
    assert {name: type(policy(name)).__name__ for name in ALL} == {name: name.capitalize() for name in ALL}
    assert type(policy("async")).__module__ == "roundtable.common.policies.async_"  # the word itself is a keyword


@given(clocks, clocks)
@pytest.mark.parametrize("name", ["sync", "backup", "local", "average"])
def test_under_rounds_a_worker_starts_only_when_all_before_is_done(name: str, clock: int, slowest: int) -> None:
    assert policy(name).may_start(clock, slowest) == (clock <= slowest)


@given(clocks, clocks, st.integers(0, 9))
def test_under_ssp_a_worker_leads_by_s_at_most(clock: int, slowest: int, s: int) -> None:
    assert policy("ssp", max_staleness=s).may_start(clock, slowest) == (clock - slowest <= s)
    assert policy("ssp", max_staleness=0).may_start(clock, slowest) == policy("sync").may_start(clock, slowest)


@given(clocks, clocks)
def test_under_async_a_worker_never_waits(clock: int, slowest: int) -> None:
    assert policy("async", max_staleness=0).may_start(clock, slowest)


@given(st.integers(0, 3))
def test_only_backup_leaves_micro_batches_out(b: int) -> None:
    assert {name: policy(name, backup_micro_batches=b).may_leave_out for name in ALL} == {**dict.fromkeys(ALL, 0), "backup": b}


@given(st.integers(0, 1000))
def test_staleness_divides_the_learning_rate_only_where_asked_to(staleness: int) -> None:
    for name in ALL:
        assert policy(name).lr_scale(staleness) == 1.0
    for name in ("ssp", "async"):
        assert policy(name, staleness_lr=True).lr_scale(staleness) == 1 / max(1, staleness)
    assert policy("sync", staleness_lr=True).lr_scale(staleness) == 1.0


def test_delay_compensation_adds_the_squared_gradient_times_the_change() -> None:
    g, now, then = torch.tensor([2.0, -3.0]), torch.tensor([1.0, 5.0]), torch.tensor([0.5, 7.0])
    for name in ("ssp", "async"):
        out = policy(name, delay_compensation=0.5).compensate(g, now, then)
        assert out.tolist() == [2.0 + 0.5 * 4 * 0.5, -3.0 + 0.5 * 9 * -2]
    for name in ALL:
        assert policy(name).compensate(g, now, then) is g
    assert g.tolist() == [2.0, -3.0]


@given(st.integers(1, 50), st.integers(1, 8), st.integers(1, 3), st.integers(1, 12), st.integers(0, 60))
def test_updates_are_rounds_or_merges_of_which_the_last_may_be_short(
    samples: int, batch: int, epochs: int, h: int, after: int
) -> None:
    segment = make_segment(before=None, samples=samples, global_batch=batch, micro_batch=1, epochs=epochs, round_limit=None)
    for name in ("sync", "backup", "ssp", "async"):
        assert merges(policy(name, local_steps=h), segment) == list(range(segment.rounds + 1))
    assert merges(policy("average"), segment) == [0, segment.rounds]
    assert policy("local", local_steps=h).updates(segment) == math.ceil(segment.rounds / h)
    together = min(after, segment.rounds)
    expected = [*range(together), *range(together, segment.rounds, h), segment.rounds]
    assert merges(policy("local", local_steps=h, local_after=after), segment) == expected


def merges(policy: Policy, segment: Segment) -> list[int]:
    """How many rounds are in the weights of each version."""
    return [policy.rounds_in(segment, update) for update in range(policy.updates(segment) + 1)]


@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 60))
def test_local_steps_begin_after_that_many_rounds_of_the_run_whatever_its_segments(rounds: int, h: int, after: int) -> None:
    p = policy("local", local_steps=h, local_after=after)
    first = make_segment(before=None, samples=rounds, global_batch=1, micro_batch=1, epochs=1, round_limit=None)
    second = make_segment(before=first, samples=rounds, global_batch=1, micro_batch=1, epochs=1, round_limit=None)
    for segment in (first, second):
        for update in range(1, p.updates(segment) + 1):
            before, now = p.rounds_in(segment, update - 1), p.rounds_in(segment, update)
            assert now - before == 1 if segment.first_round + now <= after else 1 <= now - before <= h
            plain = p.outer_settings(segment.first_round + now) == {"lr": 1.0, "momentum": 0.0, "nesterov": False}
            assert plain == (segment.first_round + now <= after)


def test_a_segment_without_rounds_has_no_updates() -> None:
    segment = make_segment(before=None, samples=4, global_batch=2, micro_batch=1, epochs=1, round_limit=0)
    assert [policy(name).updates(segment) for name in ALL] == [0] * len(ALL)


def test_only_local_has_an_outer_optimizer_with_nesterov_where_there_is_momentum() -> None:
    assert {name for name in ALL if policy(name).outer_optimizer} == {"local"}
    outer = {"lr": 0.6, "momentum": 0.8, "nesterov": True}
    assert policy("local", outer_lr=0.6, outer_momentum=0.8).outer_optimizer == ("SGD", outer)
    plain = {"lr": 1.0, "momentum": 0.0, "nesterov": False}
    assert policy("local", outer_lr=1.0, outer_momentum=0.0).outer_optimizer == ("SGD", plain)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_outer_optimizer_can_be_made(momentum: float) -> None:
    outer = policy("local", outer_momentum=momentum).outer_optimizer
    assert outer is not None
    getattr(torch.optim, outer[0])([torch.zeros(1)], **outer[1])
