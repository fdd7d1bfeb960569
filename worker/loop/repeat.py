"""State that a script carries from batch to batch, found by computing one micro-batch twice.

A micro-batch is to be a function of weights, buffers, samples and seed alone, as any worker may compute it. A hidden state, a
counter or a generator of the script's own is none of these. So the chief computes the first micro-batch of a run again when its
contribution is made, and compares the gradients' bits. Nothing comes of that but a warning, which the coordinator gives.
"""

from __future__ import annotations

import zlib

import torch

from roundtable.worker.replica.buffers import as_bytes
from roundtable.worker.replica.replica import Replica

#: What takes longer, seconds, or has more bytes of parameters, is not computed twice.
LONGEST_S, _MOST_BYTES = 1.0, 256 << 20


def may_repeat(replica: Replica) -> bool:
    """Whether a micro-batch of this model can be computed twice without anybody noticing, and for little."""
    layout, parameters = replica.layout, replica.parameters.values()
    is_small = sum(parameter.nbytes for parameter in parameters) <= _MOST_BYTES
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    return is_small and on_cpu and not layout.tables and not layout.sharded_layers


class Repeat:
    """The two times that a micro-batch is computed. `once`: the first is over."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._weights = self._gradients = {}  # type: dict[int, int | None]
        self.once = False

    def note(self) -> None:
        """The model has the gradient of the first time."""
        self._weights, self._gradients, self.once = self._read(of_gradients=False), self._read(of_gradients=True), True

    def differs(self) -> str | None:
        """The model has the gradient of the second time: the name of the first parameter for which it is another. None also if
        the weights are others by now: servers may write over them once other workers have gone on."""
        now = self._read(of_gradients=True)
        index = next((index for index, found in now.items() if found != self._gradients[index]), None)
        if index is None or self._read(of_gradients=False) != self._weights:
            return None
        return self._replica.specs[index].name

    def _read(self, of_gradients: bool) -> dict[int, int | None]:
        """A checksum of each parameter, or of its gradient."""
        parameters = self._replica.parameters.items()
        return {index: _checksum(parameter.grad if of_gradients else parameter) for index, parameter in parameters}


def _checksum(tensor: torch.Tensor | None) -> int | None:
    if tensor is None:
        return None
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    return zlib.crc32(as_bytes(dense).numpy())  # type: ignore[arg-type]
