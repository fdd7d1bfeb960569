"""The summation tree: the shape depends on K alone, and each leaf is counted once, whatever comes in whichever order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roundtable.common.model.reduction_tree import Span, TreeSum, fold, halves, is_node, parent

counts = st.integers(1, 40)


def pair(left: str, right: str) -> str:
    """An addition that shows its shape."""
    return f"({left}+{right})"


def nodes(count: int) -> list[Span]:
    """All nodes, by walking down from the root."""
    out, todo = [], [(0, count)]
    while todo:
        span = todo.pop()
        out.append(span)
        if span[1] - span[0] > 1:
            todo += halves(span)
    return out


def part(span: Span, count: int) -> str:
    """The sum over a node, as a worker that computed all of it would send it."""
    if span[1] - span[0] == 1:
        return str(span[0])
    return pair(*(part(half, count) for half in halves(span)))


def whole(count: int) -> str:
    return fold({k: str(k) for k in range(count)}, count, pair)


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[int, list[Span]]:
    """K, and nodes that overlap and repeat, of which some cover every leaf, in any order."""
    count = draw(counts)
    every = nodes(count)
    spans = draw(st.lists(st.sampled_from(every), max_size=15))
    cover, todo = [], [(0, count)]
    while todo:
        span = todo.pop()
        if span[1] - span[0] == 1 or draw(st.booleans()):
            cover.append(span)
        else:
            todo += halves(span)
    return count, draw(st.permutations(spans + cover))


def test_the_shape_is_the_one_in_the_docstring() -> None:
    assert whole(1) == "0"
    assert whole(4) == "((0+1)+(2+3))"
    assert whole(5) == "(((0+1)+(2+3))+4)"
    assert whole(7) == "(((0+1)+(2+3))+((4+5)+6))"
    assert whole(11) == "((((0+1)+(2+3))+((4+5)+(6+7)))+((8+9)+10))"


@given(counts)
def test_the_shape_is_that_of_adding_neighbours_level_by_level(count: int) -> None:
    level = [str(k) for k in range(count)]
    while len(level) > 1:
        paired = [pair(a, b) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = paired + ([level[-1]] if len(level) % 2 else [])
    assert whole(count) == level[0]


@given(counts)
def test_nodes_are_what_halving_the_root_leads_to_and_nothing_else(count: int) -> None:
    found = nodes(count)
    assert len(found) == len(set(found)) == 2 * count - 1
    spans = {(lo, hi) for lo in range(-1, count + 2) for hi in range(-1, count + 3)}
    assert {span for span in spans if is_node(span, count)} == set(found)


@given(counts)
def test_a_node_is_the_parent_of_its_halves(count: int) -> None:
    for span in nodes(count):
        if span[1] - span[0] > 1:
            left, right = halves(span)
            assert (left[0], right[1]) == span and left[1] == right[0]
            assert parent(left, count) == parent(right, count) == span
    with pytest.raises(ValueError, match="root"):
        parent((0, count), count)


@given(deliveries())
# I4
def test_any_order_any_split_any_repetition_gives_the_same_sum(delivery: tuple[int, list[Span]]) -> None:
    count, spans = delivery
    total = TreeSum(count, pair)
    counted: set[int] = set()
    for span in spans:
        new = set(range(*span)) - counted
        assert total.file(span, part(span, count)) == bool(new)
        counted |= new
        assert total.missing() == sorted(set(range(count)) - counted)
        assert total.complete == (len(counted) == count)
        # what is held are disjoint nodes, never both halves of one
        held = sorted(total.held)
        assert sorted(k for span in held for k in range(*span)) == sorted(counted)
        assert all(is_node(span, count) for span in held)
        assert len({parent(span, count) for span in held if span != (0, count)}) == len([s for s in held if s != (0, count)])
        assert all(value == part(span, count) for span, value in total.held.items())
    assert total.total == whole(count)


@given(counts, st.integers(0, 1 << 32))
# I4
def test_floats_come_out_with_the_bits_of_the_fold(count: int, seed: int) -> None:
    rng = random.Random(seed)
    leaves = {k: rng.uniform(-1, 1) * 10 ** rng.randint(-8, 8) for k in range(count)}
    total = TreeSum(count, float.__add__)
    for k in rng.sample(range(count), count):
        total.file((k, k + 1), leaves[k])
    assert total.total.hex() == fold(leaves, count, float.__add__).hex()


@given(st.integers(1, 16).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1))))
def test_a_leaf_that_was_left_out_leaves_its_place_to_its_sibling(delivery: tuple[int, set[int]]) -> None:
    count, present = delivery

    def reduce(span: Span) -> str | None:
        if span[1] - span[0] == 1:
            return str(span[0]) if span[0] in present else None
        left, right = map(reduce, halves(span))
        return pair(left, right) if left and right else left or right

    assert fold({k: str(k) for k in present}, count, pair) == reduce((0, count))


def test_nothing_cannot_be_summed() -> None:
    with pytest.raises(ValueError, match="at least one"):
        fold({}, 4, pair)
    with pytest.raises(KeyError):
        _ = TreeSum(2, pair).total


@given(counts, st.integers(-2, 42), st.integers(-2, 42))
def test_what_is_no_node_is_refused_and_changes_nothing(count: int, lo: int, hi: int) -> None:
    total = TreeSum(count, pair)
    if is_node((lo, hi), count):
        assert total.file((lo, hi), "x")
    else:
        with pytest.raises(ValueError, match="no node"):
            total.file((lo, hi), "x")
        assert total.held == {}
