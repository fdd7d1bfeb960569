"""Sums whose adding is put off have the bits of those that are added up at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.layout import Kind
from common.sums import Sum, add_up, adder
from common.tree import fold

SIZE = 50


@pytest.mark.parametrize("kind", ["param", "max"])
@given(leaves=st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from([1.0, 2.0, 0.5])), min_size=1, max_size=9))
def test_it_makes_no_difference_what_is_put_off(kind: Kind, leaves: list[tuple[bool, bool, float]]) -> None:
    """A leaf may stay, be owned, and have a scale; it is in one bit of what is present."""
    values = torch.randn(len(leaves), SIZE, generator=torch.Generator().manual_seed(len(leaves)))
    plain = {k: Sum(values[k].clone(), 1 << k, scale=scale if kind == "param" else 1.0) for k, (_, _, scale) in enumerate(leaves)}
    mixed = {
        k: replace(plain[k], values=values[k].clone(), stays=stays, owned=owned and not stays)
        for k, (stays, owned, _) in enumerate(leaves)
    }
    at_once, later = (fold(given, len(leaves), adder(kind)) for given in (plain, mixed))
    start, length = 7, 30
    blocks: dict[int, torch.Tensor] = {}
    block = add_up(kind, later.section(start, length), lambda depth: blocks.setdefault(depth, torch.full((length,), torch.nan)))
    assert torch.equal(block.values * block.scale, at_once.values[start : start + length] * at_once.scale)
    assert block.present == at_once.present == (1 << len(leaves)) - 1
    assert (later.halves is not None) == (len(leaves) > 1 and all(stays for stays, _, _ in leaves))
    for k, (stays, _, _) in enumerate(leaves):
        assert not stays or torch.equal(mixed[k].values, values[k])
