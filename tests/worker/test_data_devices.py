"""A batch comes to its device whatever its tensors are nested in, and all else in it stays as it is."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from roundtable.worker.data.devices import move

META, CPU = torch.device("meta"), torch.device("cpu")
Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Sample:
    x: torch.Tensor
    name: str
    more: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "more", [self.x])


class Encoding(UserDict[str, Any]):
    """Moves itself, as the BatchEncoding of transformers does."""

    def to(self, device: torch.device) -> Encoding:
        return Encoding({key: value.to(device) for key, value in self.data.items()})


def one() -> torch.Tensor:
    return torch.ones(2)


def found(value: Any) -> list[str]:
    """The devices of all tensors in a batch."""
    if isinstance(value, torch.Tensor):
        return [value.device.type]
    if isinstance(value, Sample):
        return found([value.x, value.more])
    if isinstance(value, PackedSequence):
        return [value.data.device.type]
    items = value.values() if hasattr(value, "values") else value if isinstance(value, list | tuple) else []
    return [device for item in items for device in found(item)]


@pytest.mark.parametrize(
    ("batch", "tensors"),
    [
        (one(), 1),
        ([one(), one()], 2),
        ((one(), "text", 3, None), 1),
        ({"a": one(), "b": {"c": [one(), "text"]}}, 2),
        (OrderedDict(a=one()), 1),
        (defaultdict(list, a=one()), 1),
        (MappingProxyType({"a": one()}), 1),
        (Pair(one(), (one(), 0.5)), 2),
        (Sample(one(), "text"), 2),
        (Encoding(ids=one(), mask=one()), 2),
        (pack_sequence([one(), one()]), 1),
        ("text", 0),
    ],
)
def test_a_batch_comes_to_its_device_as_what_it_was(batch: Any, tensors: int) -> None:
    assert move(batch, CPU) is batch
    moved = move(batch, META)
    assert type(moved) is (dict if isinstance(batch, MappingProxyType) else type(batch))
    assert found(moved) == ["meta"] * tensors and found(batch) == ["cpu"] * tensors
    assert str(moved).count("text") == str(batch).count("text")


def test_a_batch_that_is_moved_leaves_the_one_that_it_came_from() -> None:
    batch = defaultdict(list, a=[one()])
    moved = move(batch, META)
    assert moved["new"] == [] and "new" not in batch and moved is not batch
