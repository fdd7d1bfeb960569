"""Codecs that send each value in another floating-point format, rounded to nearest."""

from __future__ import annotations

from typing import ClassVar

import torch

from roundtable.common.codecs import Codec, Coded, State
from roundtable.common.codecs.blocks import SPAN, spans
from roundtable.common.model.tensor_bytes import dtype_name, from_frame


class Cast(Codec):
    """Values beyond the format's largest one are clipped to it, so that finite values stay finite."""

    dtype: ClassVar[torch.dtype]

    def encode(self, values: torch.Tensor, seed: int, state: State | None) -> Coded:
        largest = torch.finfo(self.dtype).max
        sent = torch.empty(values.numel(), dtype=self.dtype)
        scratch = torch.empty(min(SPAN, values.numel()))
        for span in spans(values.numel()):
            clamped = torch.clamp(span.of(values), -largest, largest, out=scratch[: span.length])
            span.of(sent).copy_(clamped)
        return Coded(sent.view(torch.uint8), None)

    def decode(self, frame: memoryview, numel: int, seed: int) -> torch.Tensor:
        return from_frame(frame, dtype_name(self.dtype), numel, "a frame").to(torch.float32, copy=True)
