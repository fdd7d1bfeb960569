"""The loss over a sharded layer, computed from every server's part, and the gradients that a worker contributes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from roundtable.common.model.sparse_rows import owner_of
from roundtable.common.protocol.messages.sharded import LayerUse
from roundtable.worker.client.sharded_client import Sums
from roundtable.worker.layers.margin_losses import Margin


@dataclass(frozen=True)
class LayerGradient:
    """The contribution of one use of a layer: its question's number, and log_total, g and own_gradient (B) of `LayerPush`."""

    number: int
    smoothing: float
    log_total: torch.Tensor
    g: torch.Tensor
    own_gradient: torch.Tensor

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors that are sent, in this order."""
        return [self.log_total, self.g, self.own_gradient]

    @property
    def gradients(self) -> list[torch.Tensor]:
        """The tensors that must be finite."""
        return self.tensors

    @property
    def use(self) -> LayerUse:
        return LayerUse(self.number, len(self.g), self.smoothing)

    def times(self, weight: float) -> LayerGradient:
        """Return the contribution times the weight of its micro-batch. This one is of the mean over it."""
        return replace(self, g=self.g * weight, own_gradient=self.own_gradient * weight)


@dataclass(frozen=True)
class HiddenGradient:
    """The contribution of one use of a hidden layer. Servers have the gradient by its outputs (B, rows) from the question."""

    number: int
    slopes: torch.Tensor
    scale: float = 1.0

    @property
    def tensors(self) -> list[torch.Tensor]:
        return []

    @property
    def gradients(self) -> list[torch.Tensor]:
        return [self.slopes]

    @property
    def use(self) -> LayerUse:
        return LayerUse(self.number, len(self.slopes), scale=self.scale)

    def times(self, weight: float) -> HiddenGradient:
        return replace(self, scale=self.scale * weight)


@dataclass(frozen=True)
class Combined:
    """The sums of all servers, (B) each, except `slope` (B, D).

    `losses` are the losses, and `log_total` is the logarithm of the sum of exp(z) over all classes. `own_slope` is the gradient
    of the losses by the logit of a sample's own class, margin included. `slope` is their gradient by the features.
    """

    losses: torch.Tensor
    log_total: torch.Tensor
    own_slope: torch.Tensor
    slope: torch.Tensor


def combine(
    sums: Sequence[Sums],
    features: torch.Tensor,
    labels: torch.Tensor,
    servers: int,
    classes: int,
    smoothing: float,
    margin: Margin | None,
) -> Combined:
    """Return the loss of each sample, and what backward needs, from each server's sums over the classes but a sample's own.

    Let t be the logit of a sample's own class and q = 1 - p of that class. Then loss = softplus(log of the others' sum - t). Its
    gradient by the features is the sum of p x row over the others - q x own row. With smoothing s over C classes, the target is
    1 - s + s/C for the own class and s/C for the others.
    """
    own = torch.empty(len(features), sums[0].own.shape[1], dtype=features.dtype)
    owners = owner_of(labels, servers)
    for server, part in enumerate(sums):
        own[owners == server] = part.own
    dim = features.shape[1]
    t, margin_slope = (own[:, :dim] * features).sum(1), torch.ones(len(features), dtype=features.dtype)
    t = t + own[:, dim] if own.shape[1] > dim else t
    if margin is not None:
        cosine, margin_slope = margin.own(t / margin.scale)
        t = cosine * margin.scale
    others = torch.logsumexp(torch.stack([part.largest + part.total.log() for part in sums]), 0)
    log_total = torch.logaddexp(others, t)
    q = torch.sigmoid(others - t)
    losses = nn.functional.softplus(others - t)
    slope = torch.zeros_like(features)
    for part in sums:
        slope += torch.exp(part.largest - log_total)[:, None] * part.rows
    if smoothing:
        of_all = torch.stack([part.sum_of_rows for part in sums]).sum(0)
        logits = features @ of_all[:dim] + (of_all[dim] if len(of_all) > dim else 0.0)
        losses = losses + smoothing * t - smoothing / classes * logits
        slope -= smoothing / classes * of_all[:dim]
    slope -= ((q - smoothing) * margin_slope)[:, None] * own[:, :dim]
    return Combined(losses, log_total, (smoothing - q) * margin_slope - smoothing / classes, slope)


class Losses(torch.autograd.Function):
    """Losses that are known already, as a function of the features for autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        anchor: torch.Tensor,
        losses: torch.Tensor,
        slope: torch.Tensor,
        backward: Callable[[torch.Tensor], None],
    ) -> torch.Tensor:
        ctx.save_for_backward(slope)
        ctx.dtype, ctx.backward_of = features.dtype, backward
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        ctx.backward_of(g.detach())
        return (g[:, None] * slope).to(ctx.dtype), None, None, None, None


class Outputs(torch.autograd.Function):
    """Outputs that are known already. Backward asks for the features' gradient when it needs it.

    The result is not an input, so a later layer may work in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        anchor: torch.Tensor,
        outputs: Callable[[], torch.Tensor],
        backward: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        ctx.ask = backward
        return outputs()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return ctx.ask(g.detach()), None, None, None
