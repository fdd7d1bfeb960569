"""Changes that a script makes to its model after training. They are in no file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from roundtable.worker import tensor_names

#: A worker reports at most so many tensors that its script has changed after the last round.
_MOST_CHANGED = 100


def _tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a model, by name."""
    return dict([*tensor_names.parameters(model), *tensor_names.buffers(model)])


class FinalTensors:
    """The tensors that the model had when its training ended."""

    def __init__(self) -> None:
        #: The model; None before the end of the first loop.
        self._model: nn.Module | None = None
        #: By name: a tensor, and how often torch had written to it.
        self._versions: dict[str, tuple[torch.Tensor, int]] = {}

    def are(self, model: nn.Module) -> None:
        """Note the tensors of a model at the end of a loop over batches."""
        self._model, self._versions = model, {}
        self.are_also(_tensors_of(model))

    def are_also(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Note tensors that were computed again for the model's file."""
        self._versions |= {name: (tensor, tensor._version) for name, tensor in tensors.items()}

    def changed(self) -> list[str]:
        """Return the names of tensors that the script has changed since, at most 100."""
        now = _tensors_of(self._model) if self._model is not None else {}
        changed = [name for name, (was, version) in self._versions.items() if now.get(name) is not was or was._version != version]
        return changed[:_MOST_CHANGED]
