"""What workers ask sharded layers and contribute to them, as it is kept and told to a backup."""

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
    """A question whose answer may be contributed.

    Once it is answered, it also has the number of the layer's updates until then, and log Σ exp(z) over the classes here.
    """

    version: int
    layer: int
    samples: Samples
    normalised: bool = False
    updates: int = -1
    log_total: torch.Tensor | None = None
    #: Of a hidden layer, once the way back has been asked for: the gradient by the outputs here.
    slopes: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerContribution:
    """What samples contribute to a sharded layer, g x samples of their micro-batch; and the question that it is about."""

    layer: int
    terms: Terms | Products
    normalised: bool = False
    question: OpenQuestion | None = None


@dataclass(frozen=True)
class ClosedRound:
    """A round that is complete: what counts in it, see `LayerShards.close`."""

    round: int
    parts: Sequence[LayerContribution]
    samples: int
    hypers: Sequence[Mapping[str, Any]]
    factor: torch.Tensor | None


def replicated(
    round_: int,
    parts: Sequence[LayerContribution],
    samples: int,
    hypers: Sequence[Mapping[str, Any]],
    factor: torch.Tensor | None,
) -> ReplicateLayers:
    """What is told of a round that is complete, see `LayerShards.close`, before its tensors."""
    terms = [LossTerms(part.layer, len(part.terms.tensors[0]), part.normalised) for part in parts]
    return ReplicateLayers(round_, samples, terms, [dict(one) for one in hypers], value_of(factor))


def tensors_of(parts: Sequence[LayerContribution]) -> list[torch.Tensor]:
    """The tensors that follow it."""
    return [tensor.cpu() for part in parts for tensor in part.terms.tensors]
