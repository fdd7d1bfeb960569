"""A check for state that a script carries from batch to batch: one micro-batch is computed twice.

Any worker may compute a micro-batch, so its gradients must depend on weights, buffers, samples and seed alone. A hidden state, a
counter or a random generator of the script's own breaks this. Therefore the chief computes the first micro-batch of a run again
after its contribution, and compares the gradients' bits. If they differ, the coordinator warns; nothing else happens.
"""

from __future__ import annotations

import zlib

import torch

from roundtable.worker.replica.buffers import as_bytes
from roundtable.worker.replica.replica import Replica

#: A micro-batch is not computed twice if it takes longer (seconds), or if the parameters have more bytes.
LONGEST_S, _MOST_BYTES = 1.0, 256 << 20


def may_repeat(replica: Replica) -> bool:
    """Return whether a micro-batch of this model can be computed twice cheaply and without side effects."""
    layout, parameters = replica.layout, replica.parameters.values()
    is_small = sum(parameter.nbytes for parameter in parameters) <= _MOST_BYTES
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    return is_small and on_cpu and not layout.tables and not layout.sharded_layers


class Repeat:
    """The two computations of a micro-batch. `once`: the first one is done."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._weights = self._gradients = {}  # type: dict[int, int | None]
        self.once = False

    def note(self) -> None:
        """Note the gradients of the first computation, which are in the model."""
        self._weights, self._gradients, self.once = self._read(of_gradients=False), self._read(of_gradients=True), True

    def differs(self) -> str | None:
        """Return the name of the first parameter whose second gradient, which is in the model, is different.

        Return None if there is none, or if the weights have changed. Servers may overwrite them once other workers have gone on.
        """
        now = self._read(of_gradients=True)
        index = next((index for index, found in now.items() if found != self._gradients[index]), None)
        if index is None or self._read(of_gradients=False) != self._weights:
            return None
        return self._replica.specs[index].name

    def _read(self, of_gradients: bool) -> dict[int, int | None]:
        """Return a checksum of each parameter, or of its gradient."""
        parameters = self._replica.parameters.items()
        return {index: _checksum(parameter.grad if of_gradients else parameter) for index, parameter in parameters}


def _checksum(tensor: torch.Tensor | None) -> int | None:
    if tensor is None:
        return None
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    return zlib.crc32(as_bytes(dense).numpy())  # type: ignore[arg-type]
