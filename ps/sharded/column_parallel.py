"""Hidden layers whose outputs are dealt out to servers: what a server computes of one, a tile of rows at a time.

Each server has some of the layer's outputs and the rows of the weight that make them, and workers divide the batch: "column
parallel" in Shoeybi et al., "Megatron-LM" (2019), and for the fully connected layers of a CNN Krizhevsky's "One weird trick for
parallelizing convolutional neural networks" (2014).

Shapes: B samples, R rows here, D features, and one more of ones where there is a bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass
class Products:
    """What samples contribute: features (B, D + bias), and the gradient of the loss by the outputs here (B, R)."""

    features: torch.Tensor
    slopes: torch.Tensor

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All there is, in order."""
        return [self.features, self.slopes]

    @staticmethod
    def joined(parts: Sequence[Products]) -> Products:
        """The samples of several micro-batches as one."""
        return Products(torch.cat([one.features for one in parts]), torch.cat([one.slopes for one in parts]))

    def mean(self, samples: int) -> Products:
        return replace(self, slopes=self.slopes / samples)

    def gradient(self, start: int, end: int) -> torch.Tensor:
        """Of rows start .. end-1 of the weight (end - start, D + bias), summed over the samples in their order."""
        return self.slopes[:, start:end].T @ self.features
