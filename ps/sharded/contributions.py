"""Questions to sharded layers and contributions to them, as a server keeps them, and the messages to its backup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from roundtable.common.protocol.messages.replication import LossTerms, ReplicateLayers
from roundtable.ps.params.clipping import value_of
from roundtable.ps.sharded.column_parallel import Products
from roundtable.ps.sharded.softmax import Samples, Terms


@dataclass
class OpenQuestion:
    """A question that a later push may refer to."""

    #: The version of the weights that the question names.
    version: int
    layer: int
    samples: Samples
    normalised: bool = False
    #: Once answered: the layer's number of updates at that moment.
    updates: int = -1
    #: Once answered: log Σ exp(z) over this server's classes (B).
    log_total: torch.Tensor | None = None
    #: Of a hidden layer, once the backward question has come: the gradient of the loss by this server's outputs (B, R).
    slopes: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerContribution:
    """The contribution of a micro-batch's samples to one sharded layer, kept as factors of the gradient."""

    layer: int
    #: The factors of the sum of the samples' gradients: the mean's times the number of the micro-batch's samples.
    terms: Terms | Products
    normalised: bool = False
    #: The question that the worker asked for these samples. None at a backup.
    question: OpenQuestion | None = None


@dataclass(frozen=True)
class ClosedRound:
    """A closed round: the arguments of `LayerShards.close`."""

    round: int
    parts: Sequence[LayerContribution]
    weight: float
    hypers: Sequence[Mapping[str, Any]]
    factor: torch.Tensor | None


def replicated(
    round_: int,
    parts: Sequence[LayerContribution],
    weight: float,
    hypers: Sequence[Mapping[str, Any]],
    factor: torch.Tensor | None,
) -> ReplicateLayers:
    """Return the message about a closed round, without its tensors. The arguments are those of `LayerShards.close`."""
    terms = [LossTerms(part.layer, len(part.terms.tensors[0]), part.normalised) for part in parts]
    return ReplicateLayers(round_, weight, terms, [dict(one) for one in hypers], value_of(factor))


def tensors_of(parts: Sequence[LayerContribution]) -> list[torch.Tensor]:
    """Return the tensors of a round, on the CPU, in the order of the message that `replicated` returns."""
    return [tensor.cpu() for part in parts for tensor in part.terms.tensors]
