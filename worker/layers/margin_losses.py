"""Losses with a margin. Features and rows count as directions, and a sample's own class must win by some distance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

#: The sine of the smallest angle whose slope is exact.
_SMALLEST_SINE = 1e-3


class Margin(Protocol):
    """A margin. Logits are `scale` x cosine, and the logit of a sample's own class is `scale` x `own(cosine)`."""

    @property
    def scale(self) -> float: ...

    def own(self, cosine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the replacement of the cosine (B), and its derivative (B)."""


@dataclass(frozen=True)
class CosFace:
    """cos - margin (Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", 2018)."""

    scale: float = 64.0
    margin: float = 0.35

    def own(self, cosine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return cosine - self.margin, torch.ones_like(cosine)


@dataclass(frozen=True)
class ArcFace:
    """cos(angle + margin) (Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", 2019).

    Past a half turn it goes on downwards as a straight line: cos - margin x sin(margin). The value is exact at every angle. Its
    slope by the cosine grows without bound as the angle goes to 0. Below an angle of 0.001, the slope is that of 0.001.
    """

    scale: float = 64.0
    margin: float = 0.5

    def own(self, cosine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sine = ((1.0 - cosine) * (1.0 + cosine)).clamp(min=0.0).sqrt()
        shifted = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        slope = math.cos(self.margin) + cosine / sine.clamp(min=_SMALLEST_SINE) * math.sin(self.margin)
        inside = cosine > math.cos(math.pi - self.margin)
        straight = cosine - self.margin * math.sin(self.margin)
        return torch.where(inside, shifted, straight), torch.where(inside, slope, 1.0)
