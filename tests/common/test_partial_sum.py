"""Sums whose adding is put off have the bits of those that are added up at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roundtable.common.model.layout import Chunk, Piece
from roundtable.common.model.partial_sum import Sum, add_up, adder, last_of
from roundtable.common.model.reduction_tree import TreeSum, fold
from roundtable.common.protocol.model_spec import Kind

SIZE = 50


@pytest.mark.parametrize("kind", ["param", "max"])
@given(leaves=st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from([1.0, 2.0, 0.5])), min_size=1, max_size=9))
def test_it_makes_no_difference_what_is_put_off(kind: Kind, leaves: list[tuple[bool, bool, float]]) -> None:
    """A leaf may stay, be owned, and have a scale; it is in one bit of what is present."""
    chunk = Chunk(0, 0, kind, 0, "float32", [Piece(0, 0, SIZE, 0)])
    values = torch.randn(len(leaves), SIZE, generator=torch.Generator().manual_seed(len(leaves)))
    plain = {k: Sum(values[k].clone(), 1 << k, scale=scale if kind == "param" else 1.0) for k, (_, _, scale) in enumerate(leaves)}
    mixed = {
        k: replace(plain[k], values=values[k].clone(), stays=stays, owned=owned and not stays)
        for k, (stays, owned, _) in enumerate(leaves)
    }
    at_once, later = (fold(given, len(leaves), adder(chunk)) for given in (plain, mixed))
    start, length = 7, 30
    blocks: dict[int, torch.Tensor] = {}
    block = add_up(kind, later.section(start, length), lambda depth: blocks.setdefault(depth, torch.full((length,), torch.nan)))
    assert torch.equal(block.values * block.scale, at_once.values[start : start + length] * at_once.scale)
    assert block.present == at_once.present == (1 << len(leaves)) - 1
    assert (later.halves is not None) == (len(leaves) > 1 and all(stays for stays, _, _ in leaves))
    for k, (stays, _, _) in enumerate(leaves):
        assert not stays or torch.equal(mixed[k].values, values[k])


@given(
    leaves=st.lists(st.tuples(st.integers(0, 7), st.booleans(), st.booleans()), min_size=1, max_size=9),
    halved=st.booleans(),
)
def test_of_each_piece_the_last_contribution_counts_that_has_it(leaves: list[tuple[int, bool, bool]], halved: bool) -> None:
    """A leaf has some of three pieces, and may be owned, or stay."""
    chunk = Chunk(0, 0, "last", -1, "uint8", [Piece(0, 0, 4, 0), Piece(1, 0, 1, 4), Piece(2, 0, 3, 5)])
    sums = {
        k: Sum(torch.full((8,), k, dtype=torch.uint8), present, owned=owned and not stays, stays=stays)
        for k, (present, owned, stays) in enumerate(leaves)
    }
    tree = TreeSum(len(leaves), adder(chunk), joins_root=not halved)
    for k in reversed(range(len(leaves))):
        tree.file((k, k + 1), sums[k])
    for bit, piece in enumerate(chunk.pieces):
        having = [k for k, (present, _, _) in enumerate(leaves) if present >> bit & 1]
        found = last_of(tree.parts, bit)
        assert found.present >> bit & 1 == bool(having)
        if having:
            assert set(found.values[piece.offset : piece.offset + piece.length].tolist()) == {having[-1]}
    for k, (_, _, stays) in enumerate(leaves):
        assert not stays or sums[k].values.tolist() == [k] * 8
