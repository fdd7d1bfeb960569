"""The largest values and their positions, with error feedback. Smaller values wait until their sums are large enough.

Aji and Heafield, "Sparse communication for distributed gradient descent" (EMNLP 2017); Stich, Cordonnier and Jaggi,
"Sparsified SGD with memory" (NeurIPS 2018).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from roundtable.common.codecs import Codec, Coded, State
from roundtable.common.codecs.blocks import SPAN, spans
from roundtable.common.model.tensor_bytes import to_frame
from roundtable.common.runtime.errors import WireError

Positions = npt.NDArray[np.int64]

#: The first byte of a frame: the format of the positions.
_BITMAP, _INDICES = 0, 1
#: A threshold is estimated from every 61st element. No width of a matrix is likely to share this stride.
_STRIDE = 61
#: With fewer elements, all values are sorted.
_SMALL = 1 << 12
#: The smallest magnitude above zero.
_SMALLEST = float(np.nextafter(np.float32(0), np.float32(1)))


def kept(numel: int, ratio: float) -> int:
    """Return how many of `numel` elements a frame carries: the share `ratio`, and at least one."""
    return min(numel, max(1, round(ratio * numel)))


class TopK(Codec):
    """A frame has a byte, the positions in ascending order, and the values.

    The positions are a bit for each element or 32 bits each, whichever is smaller. Of equal magnitudes, the first ones are sent.
    """

    states = ("residual",)

    def encode(self, values: torch.Tensor, seed: int, state: State | None) -> Coded:
        numel = values.numel()
        residual = values.clone() if state is None else torch.add(values, state["residual"])
        at = _largest(residual, kept(numel, self.settings.ratio))
        where = torch.from_numpy(at)
        sent = residual[where]
        after = {"residual": residual.index_fill_(0, where, 0.0)}
        parts = [_pack(at, numel), np.frombuffer(to_frame(sent), np.uint8)]
        return Coded(torch.from_numpy(np.concatenate(parts)), after)

    def decode(self, frame: memoryview, numel: int, seed: int) -> torch.Tensor:
        count = kept(numel, self.settings.ratio)
        end = len(frame) - 4 * count
        if end < 1 or end != 1 + (_bitmap_bytes(numel) if frame[0] == _BITMAP else 4 * count) or frame[0] > _INDICES:
            raise WireError(f"a frame of {len(frame)} bytes is none for {count} of {numel} values")
        at = _unpack(frame[0], np.frombuffer(frame[1:end], np.uint8))
        if len(at) != count or at[-1] >= numel or (np.diff(at) <= 0).any():
            raise WireError(f"a frame does not give {count} positions among {numel}")
        out = torch.zeros(numel)
        out.numpy()[at] = np.frombuffer(frame[end:], np.uint8).view(np.float32)
        return out


def _pack(at: Positions, numel: int) -> npt.NDArray[np.uint8]:
    """Return the first byte and the positions."""
    if 4 * len(at) <= _bitmap_bytes(numel):
        return np.concatenate([np.array([_INDICES], np.uint8), at.astype(np.uint32).view(np.uint8)])
    mask = np.zeros(numel, bool)
    mask[at] = True
    return np.concatenate([np.array([_BITMAP], np.uint8), np.packbits(mask)])


def _unpack(kind: int, where: npt.NDArray[np.uint8]) -> Positions:
    """Return the positions that `_pack` has packed, or any numbers for other bytes of the same length."""
    if kind == _INDICES:
        return where.view(np.uint32).astype(np.int64)
    return np.flatnonzero(np.unpackbits(where).view(bool))


def _bitmap_bytes(numel: int) -> int:
    return -(-numel // 8)


def _largest(values: torch.Tensor, count: int) -> Positions:
    """Return the positions, ascending, of the `count` largest magnitudes. Of equal magnitudes, the first ones count.

    The result is exact. The threshold from a sample only removes elements that need not be sorted. If it removes too many, all
    elements are sorted except the zeros, of which sparse gradients have many.
    """
    at, magnitudes = _above(values, _threshold(values, count))
    if len(at) < count:
        at, magnitudes = _above(values, _SMALLEST)
    if len(at) < count:
        zeros = np.flatnonzero(values.numpy() == 0)[: count - len(at)]
        return np.sort(np.concatenate([at, zeros]))
    last = _kth(magnitudes, count)
    chosen = magnitudes > last
    ties = np.flatnonzero(magnitudes == last)
    chosen[ties[: count - np.count_nonzero(chosen)]] = True
    found: Positions = at[chosen]
    return found


def _threshold(values: torch.Tensor, count: int) -> float:
    """Return a magnitude that probably a few more than `count` elements reach."""
    if values.numel() < _SMALL:
        return _SMALLEST
    sample = np.abs(values.numpy()[::_STRIDE])
    expected = count / _STRIDE
    rank = math.ceil(expected + 4 * math.sqrt(expected) + 2)  # four standard deviations above the expected rank
    return max(_kth(sample, rank), _SMALLEST) if rank < len(sample) else _SMALLEST


def _kth(magnitudes: npt.NDArray[np.float32], k: int) -> float:
    """Return the k-th largest magnitude.

    torch.kthvalue and numpy.partition are as fast, but take at least 50 times as long on some inputs. Examples are descending
    ones, or many equal magnitudes among others.
    """
    return float(torch.from_numpy(magnitudes).topk(k, sorted=False).values.min())


def _above(values: torch.Tensor, threshold: float) -> tuple[Positions, npt.NDArray[np.float32]]:
    """Return the positions and magnitudes of the elements whose magnitude is at least `threshold`."""
    numel = values.numel()
    scratch = torch.empty(min(SPAN, numel))
    positions, magnitudes = [], []
    for span in spans(numel):
        size = torch.abs(span.of(values), out=scratch[: span.length]).numpy()
        at = np.flatnonzero(size >= threshold)
        magnitudes.append(size[at])
        positions.append(at + span.start)
    return np.concatenate(positions), np.concatenate(magnitudes)


CODEC = TopK
