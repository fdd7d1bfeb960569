"""The parts of a convolutional network, under the names of the field. torch does the arithmetic and each backward.

Images and maps are float (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import functional


def convolution(images: Tensor, filters: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0) -> Tensor:
    """Slide each of F filters over all channels of an image to make one map: (B, C, H, W) and (F, C, h, w) to (B, F, H', W').

    All places of an image share the filters' weights. `bias` is (F). This is a cross-correlation, as everywhere: filters are not
    flipped. H' is `side_after(H, h, stride, padding)`.
    """
    return functional.conv2d(images, filters, bias, stride, padding)


def side_after(side: int, field: int, stride: int = 1, padding: int = 0) -> int:
    """Return the rows (or columns) of the map that a filter or pool of `field` rows makes from `side`; 0 if it does not fit."""
    return max((side + 2 * padding - field) // stride + 1, 0)


def mean_pooling(maps: Tensor, side: int, stride: int | None = None) -> Tensor:
    """Return the mean of each window of `side` x `side`. Without `stride`, windows do not overlap.

    Backward gives each element of a window an equal part of the window's gradient.
    """
    return functional.avg_pool2d(maps, side, stride)


def max_pooling(maps: Tensor, side: int, stride: int | None = None) -> Tensor:
    """Return the largest element of each window of `side` x `side`. Without `stride`, windows do not overlap.

    Backward gives the window's gradient to that element, and 0 to the others.
    """
    return functional.max_pool2d(maps, side, stride)


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x)), elementwise. The gradient is y (1 - y)."""
    return functional.sigmoid(x)


def softmax(logits: Tensor) -> Tensor:
    """Return probabilities p of the same shape for (B, classes). Each row sums to 1."""
    return functional.softmax(logits, dim=-1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of -log softmax(logits)[label] over a batch: float (B, classes) and int64 (B) to a scalar.

    For one sample, the gradient by its logits is p - y, with y the label as a one-hot vector.
    """
    return functional.cross_entropy(logits, labels)


def mse(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of (output - y)^2 over a batch and classes, with y one-hot: float (B, classes), int64 (B) to a scalar."""
    targets = functional.one_hot(labels, outputs.shape[-1])
    return functional.mse_loss(outputs, targets.to(outputs.dtype))


#: The choices of `--loss`.
LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"cross-entropy": cross_entropy, "mse": mse}
