"""If pushes are applied at once, the plan of the learning rate is followed in the order in which micro-batches come."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roundtable.common.config.batch_plan import Segment, make_segment
from roundtable.common.config.settings import Settings
from roundtable.common.policies import load
from roundtable.ps.params.planned_rates import PlannedRates, Terms

SAMPLES, GLOBAL, MICRO = 26, 8, 2  # rounds of 4, 4, 4 and 1 micro-batches


def segments(epochs: int = 1, limit: int | None = None) -> list[Segment]:
    first = make_segment(before=None, samples=SAMPLES, global_batch=GLOBAL, micro_batch=MICRO, epochs=epochs, round_limit=None)
    second = make_segment(before=first, samples=7, global_batch=6, micro_batch=2, epochs=3, round_limit=limit)
    return [first, second]


def course(**settings: object) -> PlannedRates:
    return PlannedRates(load(Settings(policy="async", **settings)))  # type: ignore[arg-type]


@given(st.integers(1, 3), st.sampled_from([None, 5, 9]))
def test_micro_batches_are_numbered_through_all_rounds_of_all_segments(epochs: int, limit: int | None) -> None:
    plans = segments(epochs, limit)
    rounds = [segment.round(r) for segment in plans for r in range(segment.first_round, segment.end)]
    expected = [plan.index for plan in rounds for _ in range(plan.micro_batches)]
    one = course()
    assert [one._round_of(number, plans) for number in range(len(expected))] == expected
    assert sum(segment.micro_batches for segment in plans) == len(expected)
    assert one._round_of(len(expected), plans) == expected[-1]


def rate_of(terms: Terms) -> int:
    return int(terms.hypers[0]["lr"])


@given(st.integers(1, 5), st.integers(0, 1 << 30))
# I15
def test_the_planned_rates_are_used_in_order_and_each_as_often_as_planned_however_far_workers_are_apart(
    workers: int, seed: int
) -> None:
    plans = [make_segment(before=None, samples=12 * workers, global_batch=workers, micro_batch=1, epochs=1, round_limit=None)]
    chance, one, used = random.Random(seed), course(), []
    reached, speeds = [0] * workers, [10.0 ** chance.randrange(3) for _ in range(workers)]
    while min(reached) < 12:
        weights = [speed * (reached[worker] < 12) for worker, speed in enumerate(speeds)]
        (worker,) = chance.choices(range(workers), weights)
        used.append(rate_of(one.take(reached[worker], one.seen, [{"lr": reached[worker]}], plans)))
        reached[worker] += 1
    assert used == [round_ for round_ in range(12) for _ in range(workers)]


def test_a_slow_workers_last_micro_batches_are_not_applied_at_the_rate_of_their_own_rounds() -> None:
    plan = [make_segment(before=None, samples=80, global_batch=4, micro_batch=1, epochs=1, round_limit=None)]
    one, rates = course(), []
    for round_ in range(20):  # three fast workers are done when the slow one begins
        rates += [rate_of(one.take(round_, one.seen, [{"lr": 20 - round_}], plan)) for _ in range(3)]
    rates += [rate_of(one.take(round_, one.seen, [{"lr": 20 - round_}], plan)) for round_ in range(20)]
    assert rates == [20 - number // 4 for number in range(80)]


def test_a_run_that_goes_on_follows_the_plan_from_where_it_was() -> None:
    plan = [make_segment(before=None, samples=80, global_batch=4, micro_batch=1, epochs=1, round_limit=None)]
    one = PlannedRates(load(Settings(policy="async")), seen=42)
    assert rate_of(one.take(8, 42, [{"lr": 8}], plan)) == 8  # what is planned for round 10 nobody has told yet
    assert rate_of(one.take(10, 42, [{"lr": 10}], plan)) == 10
    assert rate_of(one.take(9, 42, [{"lr": 9}], plan, is_new=False)) == 11 - 1
    assert one.seen == 44


@pytest.mark.parametrize(("workers", "slow"), [(4, 1.0), (4, 3.0), (8, 1.0), (16, 10.0)])
def test_division_by_staleness_keeps_how_far_the_weights_move_in_all(workers: int, slow: float) -> None:
    chance, one, plan = random.Random(5), course(staleness_lr=True), segments(200)
    bases = [0] * workers
    due = [(chance.uniform(0.7, 1.3) * (slow if not worker else 1.0), worker) for worker in range(workers)]
    found = []
    for _ in range(500):
        due.sort()
        at, worker = due.pop(0)
        found.append(one.take(0, bases[worker], [], plan))
        bases[worker] = one.seen
        due.append((at + chance.uniform(0.7, 1.3) * (slow if not worker else 1.0), worker))
    assert sum(terms.lr_scale for terms in found) / len(found) == pytest.approx(1.0, abs=0.02)
    late = [terms.lr_scale for terms in found[100:] if terms.staleness >= 2 * workers]
    fresh = [terms.lr_scale for terms in found[100:] if terms.staleness < workers]
    assert not late or max(late) < min(fresh)


def test_without_that_every_push_moves_by_its_whole_share() -> None:
    one = course()
    assert {one.take(0, max(0, one.seen - 3), [], segments()).lr_scale for _ in range(50)} == {1.0}
