"""Plans: every sample of an epoch is in exactly one micro-batch, and segments follow one another without a gap."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec.structs import replace

from roundtable.common.config.batch_plan import Segment, derive_seed, make_segment, most_samples, samples_per_epoch

sizes = st.tuples(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20), st.integers(1, 3)).map(
    lambda t: {"samples": t[0], "global_batch": max(t[1], t[2]), "micro_batch": min(t[1], t[2]), "epochs": t[3]}
)


@st.composite
def chains(draw: st.DrawFn) -> list[Segment]:
    """Segments in a row, with or without a limit of rounds."""
    limit = draw(st.none() | st.integers(0, 40))
    out: list[Segment] = []
    for size in draw(st.lists(sizes, min_size=1, max_size=4)):
        out.append(make_segment(before=out[-1] if out else None, round_limit=limit, **size))
    return out


@given(sizes)
def test_each_place_of_an_epoch_is_used_exactly_once(size: dict[str, int]) -> None:
    segment = make_segment(before=None, round_limit=None, **size)
    used: dict[int, list[int]] = {}
    for index in range(segment.end):
        plan = segment.round(index)
        for k in range(plan.micro_batches):
            assert 0 < len(plan.places(k)) == plan.samples_in(k, k + 1) <= size["micro_batch"]
            used.setdefault(plan.epoch, []).extend(plan.places(k))
    assert used == {epoch: list(range(size["samples"])) for epoch in range(size["epochs"])}


@given(sizes)
def test_only_the_last_round_of_an_epoch_is_short_and_only_its_last_micro_batch(size: dict[str, int]) -> None:
    segment = make_segment(before=None, round_limit=None, **size)
    for index in range(segment.end):
        plan = segment.round(index)
        last = (index + 1) % segment.rounds_per_epoch == 0
        assert plan.samples == size["global_batch"] or (last and 0 < plan.samples < size["global_batch"])
        assert all(plan.samples_in(k, k + 1) == size["micro_batch"] for k in range(plan.micro_batches - 1))


@given(sizes, st.data())
def test_the_samples_of_a_span_are_those_of_its_micro_batches(size: dict[str, int], data: st.DataObject) -> None:
    segment = make_segment(before=None, round_limit=None, **size)
    plan = segment.round(data.draw(st.integers(0, segment.end - 1)))
    lo, hi = sorted(data.draw(st.tuples(*[st.integers(0, plan.micro_batches)] * 2)))
    assert plan.samples_in(lo, hi) == sum(len(plan.places(k)) for k in range(lo, hi))
    assert plan.samples_in(0, plan.micro_batches) == plan.samples


@given(chains())
def test_segments_chain(segments: list[Segment]) -> None:
    assert segments[0].first_round == segments[0].first_epoch == segments[0].index == 0
    for before, after in pairwise(segments):
        assert after.index == before.index + 1
        assert after.first_round == before.end
        assert after.first_epoch == before.first_epoch + before.epochs


@given(chains())
def test_the_total_is_what_the_rounds_use(segments: list[Segment]) -> None:
    for segment in segments:
        rounds = [segment.round(index) for index in range(segment.first_round, segment.end)]
        assert segment.total_samples == sum(plan.samples for plan in rounds)


@given(st.lists(sizes, min_size=1, max_size=4), st.integers(1, 40))
def test_a_limit_of_rounds_holds_over_all_segments_and_cuts_no_sooner(parts: list[dict[str, int]], limit: int) -> None:
    free: list[Segment] = []
    cut: list[Segment] = []
    for size in parts:
        free.append(make_segment(before=free[-1] if free else None, round_limit=None, **size))
        cut.append(make_segment(before=cut[-1] if cut else None, round_limit=limit, **size))
    assert cut[-1].end == min(limit, free[-1].end)
    assert all(segment.rounds >= 0 for segment in cut)
    for a, b in zip(free, cut, strict=True):
        assert all(a.round(index) == b.round(index) for index in range(b.first_round, b.end))


@given(chains(), st.integers(-3, 400))
def test_rounds_by_size_are_those_that_are_left(segments: list[Segment], first: int) -> None:
    for segment in segments:
        left = range(max(first, segment.first_round), segment.end)
        assert segment.rounds_by_size(first) == Counter(segment.round(index).micro_batches for index in left)


@given(sizes, st.integers(1, 20), st.booleans())
def test_no_micro_batch_is_smaller_than_asked_and_no_sample_is_lost_that_need_not_be(
    size: dict[str, int], least: int, drop_last: bool
) -> None:
    places, whole, micro = size["samples"], size["global_batch"], size["micro_batch"]
    assume(least <= micro and most_samples(whole, micro, least) == whole)
    samples = samples_per_epoch(places, whole, micro, least, drop_last)
    assert places - samples <= (places % whole if drop_last else min(places % whole, least - 1))
    assume(samples)
    segment = make_segment(before=None, round_limit=None, min_micro_batch=least, **{**size, "samples": samples})
    assert segment.follows(None)
    used: dict[int, list[int]] = {}
    for index in range(segment.end):
        plan = segment.round(index)
        assert plan.samples == whole or not drop_last
        for k in range(plan.micro_batches):
            assert least <= len(plan.places(k)) == plan.samples_in(k, k + 1) <= micro
            used.setdefault(plan.epoch, []).extend(plan.places(k))
    assert used == {epoch: list(range(samples)) for epoch in range(size["epochs"])}


def test_the_last_micro_batch_of_one_gets_a_sample_of_the_one_before() -> None:
    segment = make_segment(before=None, samples=33, global_batch=33, micro_batch=8, epochs=1, round_limit=None, min_micro_batch=2)
    assert [len(segment.round(0).places(k)) for k in range(5)] == [8, 8, 8, 7, 2]
    assert samples_per_epoch(33, 16, 4, 2, False) == 32  # a round of one sample has nobody to take one from
    assert not replace(segment, min_micro_batch=5).follows(None)  # 8 and 1 are no two of at least 5


@given(chains(), st.integers(-3, 400))
def test_a_round_outside_the_segment_is_refused(segments: list[Segment], index: int) -> None:
    for segment in segments:
        if segment.first_round <= index < segment.end:
            assert segment.round(index).index == index
        else:
            with pytest.raises(IndexError, match=f"round {index}"):
                segment.round(index)


@given(st.lists(st.tuples(st.integers(0, 99), st.sampled_from(["order", "sample"]), st.lists(st.integers(0, 99))), unique_by=str))
def test_seeds_of_different_purposes_and_places_differ_and_fit_63_bits(keys: list[tuple[int, str, list[int]]]) -> None:
    seeds = [derive_seed(seed, purpose, *place) for seed, purpose, place in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert seeds == [derive_seed(seed, purpose, *place) for seed, purpose, place in keys]


def test_seeds_never_change_from_one_release_to_the_next() -> None:
    assert derive_seed(0, "sample", 1, 2) == 1299218403789085138


def test_workers_that_can_have_no_micro_batch_are_told_with_what_to_do() -> None:
    segment = make_segment(before=None, samples=640, global_batch=64, micro_batch=16, epochs=3, round_limit=None)
    assert segment.spare_workers(4) == "" and segment.passes == 3
    assert segment.spare_workers(12) == (
        "12 workers but only 4 micro-batches per round (64/16): at most 4 can work at a time. Use --global-batch 192 or "
        "--micro-batch 5."
    )
