"""Edits that a script makes after training, which are in no file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from roundtable.worker import tensor_names

#: The coordinator is told of at most so many tensors that a script has changed after the last round.
_MOST_CHANGED = 100


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers of a model, by name."""
    return dict([*tensor_names.parameters(model), *tensor_names.buffers(model)])


class FinalTensors:
    """The tensors that a model has had when its training ended."""

    def __init__(self) -> None:
        #: By name, a tensor and how often torch had written to it.
        self._versions: dict[str, tuple[torch.Tensor, int]] = {}

    def are(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """A loop over batches has ended with these."""
        self._versions = {}
        self.are_also(tensors)

    def are_also(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """These were computed anew for the model's file."""
        self._versions |= {name: (tensor, tensor._version) for name, tensor in tensors.items()}

    def changed(self, model: nn.Module | None) -> list[str]:
        """Return tensors that the script has changed since; some, if they are many."""
        now = tensors_of(model) if model is not None else {}
        changed = [name for name, (was, version) in self._versions.items() if now.get(name) is not was or was._version != version]
        return changed[:_MOST_CHANGED]
