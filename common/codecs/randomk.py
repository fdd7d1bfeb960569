"""Values at random positions that both ends draw from the seed, so that only values travel; with error feedback.

Stich, Cordonnier and Jaggi, "Sparsified SGD with memory" (NeurIPS 2018): values are not scaled up, for what is not sent
stays in the memory.

The choice is stratified: the elements, as a ring, are cut at a random place and from there into k strata whose sizes differ by
at most one, and one position is drawn in each. That takes k random numbers and no set of those already drawn. An element
in a stratum of size m is chosen with chance 1/m, and the random cut puts an element into a stratum in proportion to its size:
the sum over strata of m/n * 1/m is k/n for every element.
"""

from __future__ import annotations

import numpy as np
import torch

from roundtable.common.codecs import Codec, Coded, State
from roundtable.common.codecs.topk import Positions, kept
from roundtable.common.model.tensor_bytes import from_frame


class RandomK(Codec):
    """Frame: the chosen values, float32, in the order of their strata."""

    states = ("residual",)

    def encode(self, values: torch.Tensor, seed: int, state: State | None) -> Coded:
        residual = values.clone() if state is None else torch.add(values, state["residual"])
        where = torch.from_numpy(_positions(values.numel(), kept(values.numel(), self.settings.ratio), seed))
        frame = residual[where].view(torch.uint8)
        return Coded(frame, {"residual": residual.index_fill_(0, where, 0.0)})

    def decode(self, frame: memoryview, numel: int, seed: int) -> torch.Tensor:
        count = kept(numel, self.settings.ratio)
        sent = from_frame(frame, "float32", count, "a frame")
        out = torch.zeros(numel)
        out[torch.from_numpy(_positions(numel, count, seed))] = sent
        return out


def _positions(numel: int, count: int, seed: int) -> Positions:
    """`count` different positions among `numel`. numpy keeps PCG64's stream the same in all its versions."""
    raw = np.random.PCG64(seed).random_raw(count + 1)
    edges = np.arange(count + 1) * numel // count
    within = (raw[:count] % np.diff(edges).astype(np.uint64)).astype(np.int64)
    cut = int(raw[count] % np.uint64(numel))
    found: Positions = (edges[:-1] + within + cut) % numel
    return found


CODEC = RandomK
