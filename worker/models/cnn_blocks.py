"""The parts that a convolutional network is made of, under the names of the field. The arithmetic is torch's own, and so is every
backward: autograd knows the gradient of each.

Images and maps are float (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import functional


def convolution(images: Tensor, filters: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0) -> Tensor:
    """Each of F filters slides over all channels of an image and makes one map: (B, C, H, W) and (F, C, h, w) to (B, F, H', W').

    The filters' weights are shared by all places of an image. `bias` is (F). It is a cross-correlation, as everywhere: filters
    are not flipped. H' is `side_after(H, h, stride, padding)`.
    """
    return functional.conv2d(images, filters, bias, stride, padding)


def side_after(side: int, field: int, stride: int = 1, padding: int = 0) -> int:
    """Rows (or columns) of a map that a filter, or a pool, of `field` rows makes from `side`; 0 where it does not fit in."""
    return max((side + 2 * padding - field) // stride + 1, 0)


def mean_pooling(maps: Tensor, side: int, stride: int | None = None) -> Tensor:
    """The mean of each window of `side` x `side`, without overlap if there is no `stride`.

    Backward hands each element of a window an equal part of the window's gradient.
    """
    return functional.avg_pool2d(maps, side, stride)


def max_pooling(maps: Tensor, side: int, stride: int | None = None) -> Tensor:
    """The largest element of each window of `side` x `side`, without overlap if there is no `stride`.

    Backward hands the window's gradient to that element, and 0 to the others.
    """
    return functional.max_pool2d(maps, side, stride)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), elementwise; its gradient is y (1 - y)."""
    return functional.sigmoid(x)


def softmax(logits: Tensor) -> Tensor:
    """(B, classes) to probabilities p of the same shape, of which each row sums to 1."""
    return functional.softmax(logits, dim=-1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of -log softmax(logits)[label] over a batch: float (B, classes) and int64 (B) to a scalar.

    Of one sample the gradient with respect to its logits is p - y, with y the label as a one-hot vector.
    """
    return functional.cross_entropy(logits, labels)


def mse(outputs: Tensor, labels: Tensor) -> Tensor:
    """The mean of (output - y)^2 over a batch and all classes, with y one-hot: float (B, classes) and int64 (B) to a scalar."""
    targets = functional.one_hot(labels, outputs.shape[-1])
    return functional.mse_loss(outputs, targets.to(outputs.dtype))


#: What `--loss` chooses from.
LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"cross-entropy": cross_entropy, "mse": mse}
