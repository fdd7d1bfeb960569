"""A byte per value and a scale per block, with stochastic rounding: QSGD with a maximum norm per block.

Alistarh, Grubic, Li, Tomioka and Vojnovic, "QSGD: communication-efficient SGD via gradient quantization and encoding" (NIPS
2017). Let m be the largest magnitude of a block. A value x becomes floor(x / s + u) steps of s = m / 127, with u uniform in [0,
1). The mean over u is x / s.

A random number for each element would cost more than everything else. Instead, u is read from a table that repeats each of the
numbers (i + 1/2) / 65536 in random order. The seed draws the first place in the table for each span. Over all places, each
element meets each number equally often. So the decoded values are right in the mean over rounds, to 2^-17 of a step, which is
about float32's own precision of m. The order in the table does not matter for that. Within a round, neighbours meet unrelated
numbers.
"""

from __future__ import annotations

import numpy as np
import torch

from roundtable.common.codecs import Codec, CodecSettings, Coded, State
from roundtable.common.codecs.blocks import SPAN, spans
from roundtable.common.model.tensor_bytes import from_frame
from roundtable.common.runtime.errors import WireError

BLOCK = 256
#: Steps up to the largest magnitude: slightly less than 127, so that rounding of x / s never gives 128.
_STEPS = 126.9999
#: Blocks with no larger magnitude are sent as zeros, because the reciprocal of their step may be infinite.
_TINY = 1e-30
#: Random numbers in the table before it repeats.
_PERIOD = 1 << 16


class Int8(Codec):
    """A frame has a float32 scale for each block of 256, and then an int8 for each value. There is no state.

    If `stochastic`, the error is less than a step and has mean 0. Otherwise values are rounded to nearest with an error of half
    a step, and the seed has no effect.
    """

    def __init__(self, settings: CodecSettings, stochastic: bool = True) -> None:
        super().__init__(settings)
        self._places = _PERIOD if stochastic else 1
        self._uniform = _uniform_table() if stochastic else torch.full((SPAN,), 0.5)

    def encode(self, values: torch.Tensor, seed: int, state: State | None) -> Coded:
        numel = values.numel()
        scale_bytes = 4 * -(-numel // BLOCK)
        frame = torch.empty(scale_bytes + numel, dtype=torch.uint8)
        scales, steps = frame[:scale_bytes].view(torch.float32), frame[scale_bytes:].view(torch.int8)
        largest = _largest(values)
        largest.masked_fill_(largest <= _TINY, 0.0)
        torch.div(largest, _STEPS, out=scales)
        per_step = scales.reciprocal().masked_fill_(largest == 0, 0.0).view(-1, 1)
        scratch = torch.empty(min(SPAN, numel))
        places = np.random.PCG64(seed).random_raw(numel // SPAN + 2) % self._places
        for span, place in zip(spans(numel, BLOCK), places.tolist(), strict=False):
            uniform, out = self._uniform[place : place + span.length], scratch[: span.length]
            x = span.blocks(span.of(values))
            torch.addcmul(span.blocks(uniform), x, per_step[span.first : span.last], out=span.blocks(out))
            span.of(steps).copy_(out.floor_())
        return Coded(frame, None)

    def decode(self, frame: memoryview, numel: int, seed: int) -> torch.Tensor:
        count = -(-numel // BLOCK)
        scales = from_frame(frame[: 4 * count], "float32", count, "the scales")
        steps = from_frame(frame[4 * count :], "int8", numel, "the values")
        if not scales.isfinite().all():
            raise WireError("a scale is not finite")
        out = torch.empty(numel)
        for span in spans(numel, BLOCK):
            x = span.blocks(span.of(out).copy_(span.of(steps)))
            x.mul_(scales[span.first : span.last].view(-1, 1))
        return out


def _largest(values: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of each block."""
    whole = values.numel() // BLOCK * BLOCK
    blocks, rest = values[:whole].view(-1, BLOCK), values[whole:]
    largest = torch.maximum(blocks.amax(1), -blocks.amin(1))  # takes half the time of abs and amax
    return torch.cat([largest, rest.abs().amax().view(1)]) if len(rest) else largest


def _uniform_table() -> torch.Tensor:
    """Return the numbers (i + 1/2) / 65536 in an order that is the same everywhere, repeated as far as a span may read."""
    order = np.argsort(np.random.PCG64(0).random_raw(_PERIOD), kind="stable")
    once = torch.from_numpy(((order + 0.5) / _PERIOD).astype(np.float32))
    return once.repeat(1 + -(-SPAN // _PERIOD))


CODEC = Int8
