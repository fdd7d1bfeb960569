"""The gradient of a sharded hidden layer, a tile of rows at a time.

Each server has some of the layer's outputs and the weight's rows that make them. Workers divide the batch. Shoeybi et al. call
this "column parallel" ("Megatron-LM", 2019). Krizhevsky used it for the fully connected layers of a CNN ("One weird trick for
parallelizing convolutional neural networks", 2014).

Shapes: B samples, R rows on this server, D features. If the layer has a bias, features have one more column, of ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass
class Products:
    """A contribution of samples to a hidden layer, as two factors."""

    #: (B, D + bias).
    features: torch.Tensor
    #: The gradient of the loss by this server's outputs (B, R).
    slopes: torch.Tensor

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors in the order in which they are sent."""
        return [self.features, self.slopes]

    @staticmethod
    def joined(parts: Sequence[Products]) -> Products:
        """Return the samples of several micro-batches as one contribution."""
        return Products(torch.cat([one.features for one in parts]), torch.cat([one.slopes for one in parts]))

    def mean(self, weight: float) -> Products:
        return replace(self, slopes=self.slopes / weight)

    def gradient(self, start: int, end: int) -> torch.Tensor:
        """Return the gradient of the weight's rows start .. end-1 (end - start, D + bias), summed over samples in order."""
        return self.slopes[:, start:end].T @ self.features
