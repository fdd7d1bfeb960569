"""The weight of a round: the same bits on all servers, whatever has come as a sum; and its estimate where it is not known yet."""

from __future__ import annotations

import operator
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roundtable.common.config.batch_plan import Round, make_segment
from roundtable.common.config.settings import Settings
from roundtable.common.model.metrics import add_metrics
from roundtable.common.model.reduction_tree import fold, halves
from roundtable.common.policies import load
from roundtable.common.protocol.messages.gradients import Push
from roundtable.ps.params.planned_rates import TypicalWeight
from roundtable.ps.shard.kinds import METRICS
from roundtable.ps.updates.round_sums import RoundSums

MICRO = 3


def sums(plan: Round, **settings: object) -> RoundSums:
    policy = load(Settings(**settings))  # type: ignore[arg-type]
    return RoundSums(plan.index, policy, 1, lambda: plan, lambda number: add_metrics if number == METRICS else operator.add)


def plan_of(count: int) -> Round:
    samples = count * MICRO
    return make_segment(before=None, samples=samples, global_batch=samples, micro_batch=MICRO, epochs=1, round_limit=None).round(
        0
    )


def pushes(chance: random.Random, weights: list[float | None], plan: Round) -> list[Push]:
    """Pushes of micro-batches alone and of sums, some twice, in any order. Each has the sum of its weights along the tree."""

    def cut(span: tuple[int, int]) -> list[tuple[int, int]]:
        if span[1] - span[0] == 1 or chance.random() < 0.4:
            return [span]
        return [part for half in halves(span) if half[0] < half[1] for part in cut(half)]

    spans = [span for _ in range(2) for span in cut((0, plan.micro_batches))]
    chance.shuffle(spans)
    out = []
    for lo, hi in spans:
        samples = plan.samples_in(lo, hi)
        known = {k: MICRO if weights[k] is None else weights[k] for k in range(lo, hi)}
        total = fold(known, plan.micro_batches, operator.add)  # type: ignore[type-var]
        out.append(Push(0, lo, hi, samples, hi - lo, [], [], metrics={}, weight=None if total == samples else total))
    return out


WEIGHTS = st.lists(st.one_of(st.none(), st.just(0.0), st.floats(0.0, 1e6)), min_size=1, max_size=11)


@given(WEIGHTS, st.randoms(use_true_random=False))
def test_all_servers_divide_by_the_same_bits_whatever_comes_as_a_sum(weights: list[float | None], chance: random.Random) -> None:
    plan = plan_of(len(weights))
    found = set()
    for _ in range(3):  # servers
        one = sums(plan)
        for push in pushes(chance, weights, plan):
            one.add(METRICS, push, push.metrics)
            one.describe(push)
        found.add(one.weight())
        assert one.moves is (one.weight() != 0.0)
        committed, _ = one.entry({})
        assert committed.samples == plan.samples and committed.total_weight == one.weight()
    known = {k: float(MICRO) if weight is None else weight for k, weight in enumerate(weights)}
    assert found == {fold(known, len(weights), operator.add)}


def test_backup_divides_by_the_weight_of_what_counts() -> None:
    plan = plan_of(4)
    one = sums(plan, policy="backup", backup_micro_batches=2)
    for k, weight in enumerate([0.5, None, 7.0, 0.25]):
        push = Push(0, k, k + 1, MICRO, 1, [], [], metrics={}, weight=weight)
        one.add(METRICS, push, push.metrics)
        one.describe(push)
    one.decided = [1, 3]
    assert one.weight() == MICRO + 0.25
    committed, _ = one.entry({})
    assert (committed.samples, committed.weight, committed.dropped) == (2 * MICRO, MICRO + 0.25, 2)


def test_without_given_weights_the_ledger_has_none() -> None:
    one = sums(plan_of(2))
    push = Push(0, 0, 2, 2 * MICRO, 2, [], [], metrics={})
    one.add(METRICS, push, push.metrics)
    one.describe(push)
    assert one.entry({})[0].weight is None


# ---- ssp, async


@given(st.lists(st.integers(1, 64), min_size=1, max_size=600))
def test_the_estimate_is_exact_if_weights_are_samples(samples: list[int]) -> None:
    typical = TypicalWeight()
    assert {typical.of_round(one, one, 96) for one in samples} == {96.0}


@pytest.mark.parametrize("seed", range(3))
def test_pushes_that_are_applied_at_once_come_to_the_weighted_mean(seed: int) -> None:
    """The shares, weight / estimate, of many micro-batches come to one a round, and weigh gradients as a round does."""
    chance, typical, count = random.Random(seed), TypicalWeight(), 8
    weights = [chance.choice([0.0, 1.0, 5.0, 40.0]) for _ in range(4000)]
    gradients = [chance.gauss(1.0 / (1.0 + weight), 0.1) for weight in weights]  # long ones have other gradients
    estimates = [typical.of_round(weight, MICRO, count * MICRO) for weight in weights]
    shares = [weight / whole if whole else 0.0 for weight, whole in zip(weights, estimates, strict=True)]
    rounds = len(weights) / count
    assert sum(shares) == pytest.approx(rounds, rel=0.05)
    wanted = sum(g * w for g, w in zip(gradients, weights, strict=True)) / sum(weights)
    assert sum(share * g for share, g in zip(shares, gradients, strict=True)) / rounds == pytest.approx(wanted, rel=0.1)
    assert sum(gradients) / len(gradients) > 2 * wanted  # as it would be without weights


def test_the_estimate_follows_lengths_that_grow_and_goes_on_with_a_run() -> None:
    typical = TypicalWeight()
    for _ in range(1000):
        typical.of_round(10.0, MICRO, MICRO)
    typical = TypicalWeight(typical.sums)
    assert typical.of_round(10.0, MICRO, MICRO) == pytest.approx(10.0)
    for _ in range(1000):
        typical.of_round(100.0, MICRO, MICRO)
    assert typical.of_round(100.0, MICRO, MICRO) == pytest.approx(100.0, rel=0.03)
    assert TypicalWeight().of_round(0.0, MICRO, MICRO) == 0.0
