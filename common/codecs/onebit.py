"""A bit per value: the sign, and the mean magnitude of a block, with error feedback.

Seide, Fu, Droppo, Li and Yu, "1-bit stochastic gradient descent" (Interspeech 2014). One magnitude serves for both signs, as in
Karimireddy, Rebjock, Stich and Jaggi, "Error feedback fixes SignSGD and other gradient compression schemes" (ICML 2019). The
mean is the best approximation by one magnitude. Blocks keep layers of different scale apart.
"""

from __future__ import annotations

import numpy as np
import torch

from roundtable.common.codecs import Codec, CodecSettings, Coded, State
from roundtable.common.codecs.blocks import SPAN, spans
from roundtable.common.model.tensor_bytes import from_frame
from roundtable.common.runtime.errors import WireError

BLOCK = 1024


class OneBit(Codec):
    """A frame has a float32 mean magnitude for each block of 1,024, and then a bit for each value, 1 if it is negative."""

    states = ("residual",)

    def __init__(self, settings: CodecSettings) -> None:
        super().__init__(settings)
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
        self._signs = (1 - 2 * bits.astype(np.float32)).astype(np.float32)  # byte → eight signs

    def encode(self, values: torch.Tensor, seed: int, state: State | None) -> Coded:
        numel = values.numel()
        mean_bytes = 4 * -(-numel // BLOCK)
        frame = torch.empty(mean_bytes + -(-numel // 8), dtype=torch.uint8)
        means, bits = frame[:mean_bytes].view(torch.float32), frame[mean_bytes:].numpy()
        residual = torch.empty(numel)
        scratch, negative = torch.empty(min(SPAN, numel)), np.empty(min(SPAN, numel), dtype=bool)
        for span in spans(numel, BLOCK):
            x, out = span.of(residual), scratch[: span.length]
            if state is None:
                x.copy_(span.of(values))
            else:
                torch.add(span.of(values), span.of(state["residual"]), out=x)
            mean = span.blocks(torch.abs(x, out=out)).mean(1, keepdim=True)
            means[span.first : span.last] = mean.view(-1)
            signs = np.signbit(x.numpy(), out=negative[: span.length])
            bits[span.start // 8 : -(-span.stop // 8)] = np.packbits(signs)
            torch.copysign(mean, span.blocks(x), out=span.blocks(out))
            x.sub_(out)
        return Coded(frame, {"residual": residual})

    def decode(self, frame: memoryview, numel: int, seed: int) -> torch.Tensor:
        count = -(-numel // BLOCK)
        means = from_frame(frame[: 4 * count], "float32", count, "the means")
        bits = from_frame(frame[4 * count :], "uint8", -(-numel // 8), "the signs").numpy()
        if not means.isfinite().all():
            raise WireError("a mean magnitude is not finite")
        out = torch.empty(8 * len(bits))
        signs = out.numpy().reshape(-1, 8)
        for span in spans(numel, BLOCK):
            part = slice(span.start // 8, -(-span.stop // 8))
            self._signs.take(bits[part], axis=0, out=signs[part], mode="clip")
            span.blocks(span.of(out)).mul_(means[span.first : span.last].view(-1, 1))
        return out[:numel]


CODEC = OneBit
