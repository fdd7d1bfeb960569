"""Softmax over classes, a tile of rows at a time. Neither all logits nor the gradient of all rows ever exist in memory.

The running maximum and sum are those of Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
FlashAttention (Dao et al., 2022) adds up weighted sums of rows in the same way. The server leaves each sample's own class out,
and the worker adds it. So a margin changes nothing on the server, and 1 - p of the own class has no cancellation.

Shapes: B samples, T classes in a tile, D features, one more if the layer has a bias. Any floating dtype; servers use float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass
class Samples:
    """The samples of one micro-batch."""

    #: (B, D). If the layer has a bias, the last column is ones.
    features: torch.Tensor
    #: The place of each sample's own class among this server's rows (B), int64. -1 if the class is on another server.
    own: torch.Tensor

    def in_tile(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the samples whose own class lies in rows start .. end-1, and the place of that class within these rows."""
        which = ((self.own >= start) & (self.own < end)).nonzero().flatten()
        return which, self.own[which] - start


class OnlineSoftmax:
    """The running sums of each sample over the classes added so far, without the sample's own class."""

    def __init__(self, samples: Samples, dim: int) -> None:
        """`dim` is the number of columns of `rows`."""
        x = samples.features
        self._samples = samples
        #: The largest logit (B). The start is finite, so that differences are numbers.
        self.largest = x.new_full((len(x),), torch.finfo(x.dtype).min)
        #: The sum of exp(z - largest) (B).
        self.total = x.new_zeros(len(x))
        #: The sum of exp(z - largest) x row (B, dim).
        self.rows = x.new_zeros(len(x), dim)

    def add(self, tile: torch.Tensor, start: int) -> None:
        """Add a tile (T, D) of the table's rows, which begins at row `start`."""
        z = self._samples.features @ tile.T
        z[self._samples.in_tile(start, start + len(tile))] = -torch.inf
        largest = torch.maximum(self.largest, z.amax(1))
        rescale = (self.largest - largest).exp_()
        z.sub_(largest[:, None]).exp_()
        self.total.mul_(rescale).add_(z.sum(1))
        self.rows.mul_(rescale[:, None]).addmm_(z, tile[:, : self.rows.shape[1]])
        self.largest = largest

    @property
    def log_total(self) -> torch.Tensor:
        """Return the logarithm of the sum of exp(z) (B)."""
        return self.largest + self.total.log()


def renewed(log_total: torch.Tensor, before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """Return log Σ exp(z) after a part of the sum has changed. All arguments have shape (B).

    `log_total` is the old logarithm of the whole sum. `before` and `now` are the logarithms of the part.
    """
    rest = (1.0 - (before - log_total).exp()).clamp_(min=0.0)
    return torch.logaddexp(log_total + rest.log(), now)


@dataclass
class Terms:
    """A contribution of samples to a softmax layer."""

    samples: Samples
    #: log Σ exp(z) over all classes (B).
    log_total: torch.Tensor
    #: The factor of each sample's gradient (B).
    g: torch.Tensor
    #: The gradient of the loss by the logit of the own class (B).
    own_gradient: torch.Tensor
    #: The number subtracted from the p of every other class (B).
    smoothing: torch.Tensor

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors in the order in which they are sent."""
        samples = self.samples
        return [samples.features, samples.own, self.log_total, self.g, self.own_gradient, self.smoothing]

    @staticmethod
    def joined(terms: Sequence[Terms]) -> Terms:
        """Return the samples of several micro-batches as one contribution."""
        features, own, *others = (torch.cat(column) for column in zip(*(one.tensors for one in terms), strict=True))
        return Terms(Samples(features, own), *others)

    def mean(self, weight: float) -> Terms:
        return replace(self, g=self.g / weight, own_gradient=self.own_gradient / weight)


def gradient(terms: Terms, tile: torch.Tensor, start: int, negative: torch.Tensor | None = None) -> torch.Tensor:
    """Return the gradient (T, D) of a tile that begins at row `start`, summed over the samples in order.

    `negative` (T) is True for each class that counts for samples of other classes. None means all classes.
    """
    x = terms.samples.features
    z = x @ tile.T
    z.sub_(terms.log_total[:, None]).exp_()
    if terms.smoothing.any():
        z.sub_(terms.smoothing[:, None])
    z.mul_(terms.g[:, None])
    if negative is not None:
        z[:, ~negative] = 0.0
    which, at = terms.samples.in_tile(start, start + len(tile))
    z[which, at] = terms.own_gradient[which]
    return z.T @ x


def normalised(rows: torch.Tensor) -> torch.Tensor:
    """Return rows (T, D) scaled to length 1. Rows of zeros stay zeros."""
    return rows / lengths(rows)


def lengths(rows: torch.Tensor) -> torch.Tensor:
    """Return the lengths of rows (T, D) as (T, 1), at least 1e-12."""
    norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return norms.clamp_(min=1e-12)


def through_normalised(gradient_: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the gradient by rows (T, D), given the gradient by the same rows scaled to length 1."""
    length = lengths(rows)
    unit = rows / length
    return (gradient_ - unit * (unit * gradient_).sum(1, keepdim=True)) / length


class Best:
    """The `count` largest logits of each sample so far, and the places of their classes."""

    def __init__(self, features: torch.Tensor, count: int) -> None:
        self._features, self._count = features, count
        self.values = features.new_empty(len(features), 0)
        self.places = features.new_empty(len(features), 0, dtype=torch.int64)

    def add(self, tile: torch.Tensor, start: int) -> None:
        """Add a tile (T, D) of the table's rows, which begins at row `start`."""
        values, at = (self._features @ tile.T).topk(min(self._count, len(tile)), 1)
        values, places = torch.cat([self.values, values], 1), torch.cat([self.places, at + start], 1)
        self.values, order = values.topk(min(self._count, values.shape[1]), 1)
        self.places = places.gather(1, order)
