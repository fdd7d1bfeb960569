"""Codecs: compression of gradients on their way to a server, and of weight changes on their way back.

Each codec has a file, found by name: `load("topk", settings)` makes the `Codec` that `common/codecs/topk.py` calls `CODEC`.
Both ends load the same one. A codec's result depends on values, seed and state alone. So a retry, or another worker's try,
sends the same bytes. Codecs with error feedback (Seide et al., "1-bit stochastic gradient descent", Interspeech 2014) add the
residual of earlier frames. They get a state and return a new one, which the caller keeps once the receiver has counted the
frame.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import ClassVar

import msgspec
import torch

#: Name → flat float32 tensor with as many elements as the values, such as {"residual": ...}.
State = dict[str, torch.Tensor]


class CodecSettings(msgspec.Struct, frozen=True):
    """Settings of codecs that both ends must agree on, besides the codec's name."""

    #: topk: the share of the elements in a frame, in (0, 1].
    ratio: float = 0.01


@dataclass(frozen=True)
class Coded:
    """Encoded values."""

    #: 1-D, uint8, contiguous. The receiver needs the number of elements and the seed besides. May be the values' own memory.
    frame: torch.Tensor
    #: The encoder's state once the receiver has counted the frame; None if the codec keeps none.
    state: State | None


class Codec:
    """A conversion of flat float32 values, at least one, to bytes and back."""

    #: Names of the states that `encode` returns; empty if the codec keeps none.
    states: ClassVar[tuple[str, ...]] = ()

    def __init__(self, settings: CodecSettings) -> None:
        self.settings = settings

    def encode(self, values: torch.Tensor, seed: int, state: State | None) -> Coded:
        """Return the frame for `values` (flat, float32, finite) and the new state. `state` is None before the first frame.

        `seed` (not negative) decides random choices; each new frame should have its own. Neither `values` nor `state` is
        written to.
        """
        raise NotImplementedError

    def decode(self, frame: memoryview, numel: int, seed: int) -> torch.Tensor:
        """Return the `numel` values in `frame`, flat, float32, in memory of their own.

        Raises WireError if the frame is not valid.
        """
        raise NotImplementedError


def load(name: str, settings: CodecSettings) -> Codec:
    """Return the codec of that name: none, bf16, fp16, int8, onebit or topk."""
    codec: type[Codec] = importlib.import_module(f"roundtable.common.codecs.{name}").CODEC
    return codec(settings)
