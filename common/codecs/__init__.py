"""Compression of what travels: gradients on their way to a server, changes of the weights on their way back.

One file each, found by name: `load("topk", settings)` makes the `Codec` that `common/codecs/topk.py` calls `CODEC`.
Both ends load the same one. A codec is a pure function of (values, seed, state): the same inputs give the same bytes, so a
retry or another worker's try sends what the first one sent. Those with error feedback (Seide et al., "1-bit stochastic
gradient descent", Interspeech 2014) add what earlier frames left out to what they send: their state goes in and a new one
comes out, and the caller keeps the new one once the receiver has counted the frame.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import ClassVar

import msgspec
import torch

#: Name -> flat float32 tensor with as many elements as the values, e.g. {"residual": ...}.
State = dict[str, torch.Tensor]


class CodecSettings(msgspec.Struct, frozen=True):
    """What both ends must agree on besides the codec's name."""

    #: topk: share of the elements that a frame carries, in (0, 1].
    ratio: float = 0.01


@dataclass(frozen=True)
class Coded:
    """Values as they travel."""

    #: 1-D, uint8, contiguous. Self-contained except for the number of elements and the seed. May be the values' own memory.
    frame: torch.Tensor
    #: The encoder's state once the receiver has counted the frame; None: the codec keeps none.
    state: State | None


class Codec:
    """How flat float32 values of at least one element become bytes, and bytes values."""

    #: Names of the states that `encode` gives; none: it keeps none.
    states: ClassVar[tuple[str, ...]] = ()

    def __init__(self, settings: CodecSettings) -> None:
        self.settings = settings

    def encode(self, values: torch.Tensor, seed: int, state: State | None) -> Coded:
        """The frame for `values` (flat, float32, finite), and the state after it; None is the state before the first frame.

        `seed` (not negative) settles what is random; a new frame should have a new one. Writes neither to `values` nor to
        `state`.
        """
        raise NotImplementedError

    def decode(self, frame: memoryview, numel: int, seed: int) -> torch.Tensor:
        """The `numel` values in `frame`, flat, float32, in memory of their own.

        Raises WireError for what is no valid frame.
        """
        raise NotImplementedError


def load(name: str, settings: CodecSettings) -> Codec:
    """The codec of that name: none, bf16, fp16, int8, onebit or topk."""
    codec: type[Codec] = importlib.import_module(f"roundtable.common.codecs.{name}").CODEC
    return codec(settings)
