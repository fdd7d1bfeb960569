"""Softmax over classes a tile of rows at a time: neither all logits nor the gradient of all rows ever exist.

The running maximum and sum are those of Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); that what is
summed up can be rows as well, FlashAttention's (Dao et al., 2022). A sample's own class is left out here and comes in on the
worker: so a margin changes nothing here, and 1 - p of that class has no cancellation.

Shapes: B samples, T classes in a tile, D features, and one more for a bias. Any floating dtype; servers use float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass
class Samples:
    """Samples of one micro-batch: features (B, D), with a last column of ones where there is a bias; and the place of each one's
    class among the rows here (B), -1 where it is elsewhere."""

    features: torch.Tensor
    own: torch.Tensor

    def in_tile(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which samples' classes lie in rows start .. end-1, and where in these."""
        which = ((self.own >= start) & (self.own < end)).nonzero().flatten()
        return which, self.own[which] - start


class OnlineSoftmax:
    """For each sample over the classes seen so far but its own: the largest logit, the sum of exp(z - largest), and the sum of
    exp(z - largest) x row, without the bias."""

    def __init__(self, samples: Samples, dim: int) -> None:
        """`dim` numbers of a row are wanted."""
        x = samples.features
        self._samples = samples
        self.largest = x.new_full((len(x),), torch.finfo(x.dtype).min)  # finite, so that differences are numbers
        self.total = x.new_zeros(len(x))
        self.rows = x.new_zeros(len(x), dim)

    def add(self, tile: torch.Tensor, start: int) -> None:
        """Take in rows start .. of the table, (T, D)."""
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
        """The logarithm of the sum of exp(z) (B)."""
        return self.largest + self.total.log()


def renewed(log_total: torch.Tensor, before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """The logarithm of a sum of exp(z), of which a part had the logarithm `before` and has `now`, each (B)."""
    rest = (1.0 - (before - log_total).exp()).clamp_(min=0.0)
    return torch.logaddexp(log_total + rest.log(), now)


@dataclass
class Terms:
    """What samples contribute, each (B): the logarithm of the sum of exp(z) over all classes, g, the gradient of the logit of its
    own class; and what is taken off every p."""

    samples: Samples
    log_total: torch.Tensor
    g: torch.Tensor
    own_gradient: torch.Tensor
    smoothing: torch.Tensor

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All there is, in order."""
        samples = self.samples
        return [samples.features, samples.own, self.log_total, self.g, self.own_gradient, self.smoothing]

    @staticmethod
    def joined(terms: Sequence[Terms]) -> Terms:
        """The samples of several micro-batches as one."""
        features, own, *others = (torch.cat(column) for column in zip(*(one.tensors for one in terms), strict=True))
        return Terms(Samples(features, own), *others)

    def mean(self, samples: int) -> Terms:
        return replace(self, g=self.g / samples, own_gradient=self.own_gradient / samples)


def gradient(terms: Terms, tile: torch.Tensor, start: int, negative: torch.Tensor | None = None) -> torch.Tensor:
    """The gradient (T, D) of rows start .. of the table, summed over the samples in their order. Only `negative` (T) classes are
    in the sums of others' samples, if not all."""
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
    """Rows (T, D) scaled to length 1; of zeros, zeros."""
    return rows / lengths(rows)


def lengths(rows: torch.Tensor) -> torch.Tensor:
    """(T, 1), never 0."""
    norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return norms.clamp_(min=1e-12)


def through_normalised(gradient_: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The gradient of rows (T, D), given that of the same rows scaled to length 1."""
    length = lengths(rows)
    unit = rows / length
    return (gradient_ - unit * (unit * gradient_).sum(1, keepdim=True)) / length


class Best:
    """The `count` largest logits of each sample so far, and their places."""

    def __init__(self, features: torch.Tensor, count: int) -> None:
        self._features, self._count = features, count
        self.values = features.new_empty(len(features), 0)
        self.places = features.new_empty(len(features), 0, dtype=torch.int64)

    def add(self, tile: torch.Tensor, start: int) -> None:
        """Take in rows start .. of the table, (T, D)."""
        values, at = (self._features @ tile.T).topk(min(self._count, len(tile)), 1)
        values, places = torch.cat([self.values, values], 1), torch.cat([self.places, at + start], 1)
        self.values, order = values.topk(min(self._count, values.shape[1]), 1)
        self.places = places.gather(1, order)
