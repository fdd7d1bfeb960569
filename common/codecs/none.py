"""No compression: four bytes per value."""

from __future__ import annotations

import torch

from roundtable.common.codecs import Codec, Coded, State
from roundtable.common.model.tensor_bytes import from_frame


class Uncompressed(Codec):
    """The values without a change, in their own memory."""

    def encode(self, values: torch.Tensor, seed: int, state: State | None) -> Coded:
        return Coded(values.view(torch.uint8), None)

    def decode(self, frame: memoryview, numel: int, seed: int) -> torch.Tensor:
        return from_frame(frame, "float32", numel, "a frame").clone()


CODEC = Uncompressed
