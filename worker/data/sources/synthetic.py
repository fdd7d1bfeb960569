"""Images made from a seed, for trials without files: one blocky pattern per class, under noise."""

from __future__ import annotations

import torch
from torch import Tensor

from roundtable.common.config.batch_plan import derive_seed
from roundtable.worker.data.formats.images import Images, Request, Sample, Samples, TensorImages

#: Height and width, in pixels, of the blocks of a pattern.
BLOCK = 4
#: The share of the class's pattern in an image. The rest is noise.
PATTERN = 0.2
#: Approximate mean and standard deviation of pixels from 0 to 1.
MEAN, STD = 0.5, 0.25


def load(request: Request) -> Images:
    """Return 2,000 training and 500 held-out images, by default 1x28x28 of ten classes, or as the request says."""
    if request.shape is None and request.classes is None:
        return make(request.seed)
    shape, classes = request.shape or (1, 28, 28), request.classes or 10
    train, test = (DrawnImages(request.seed, part, count, classes, shape) for part, count in (("train", 2000), ("test", 500)))
    return Images("synthetic", train, test, classes, shape)


def make(seed: int, classes: int = 10, shape: tuple[int, int, int] = (1, 28, 28), train: int = 2000, test: int = 500) -> Images:
    """Return `train` and `test` images of `shape` (C, H, W), equally many of each class. The same seed gives the same images."""
    generator = torch.Generator().manual_seed(seed)
    patterns = _enlarge(_coarse(classes, shape, generator), shape)

    def part(count: int) -> TensorImages:
        labels = torch.arange(count) % classes
        return TensorImages(_noisy(patterns[labels], generator), labels, (MEAN,) * shape[0], (STD,) * shape[0])

    return Images("synthetic", part(train), part(test), classes, shape)


class DrawnImages(Samples):
    """Images that take up no memory. Each is drawn when it is read, from a seed of its own."""

    def __init__(self, seed: int, part: str, count: int, classes: int, shape: tuple[int, int, int]) -> None:
        self._seed, self._part, self._count, self._shape = seed, part, count, shape
        self._coarse = _coarse(classes, shape, torch.Generator().manual_seed(seed))
        self.mean, self.std = (MEAN,) * shape[0], (STD,) * shape[0]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        label = index % len(self._coarse)
        generator = torch.Generator().manual_seed(derive_seed(self._seed, self._part, index))
        pixels = _noisy(_enlarge(self._coarse[label], self._shape), generator)
        return pixels.to(torch.float32).div(255).sub(MEAN).div(STD), label


def _coarse(classes: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Return the patterns with one element for each block."""
    channels, height, width = shape
    return torch.rand(classes, channels, -(-height // BLOCK), -(-width // BLOCK), generator=generator)


def _enlarge(coarse: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return the patterns in full size, float32 (..., *shape)."""
    return coarse.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., : shape[1], : shape[2]]


def _noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images with noise, uint8, for patterns `images` of values from 0 to 1."""
    noise = torch.rand(images.shape, generator=generator)
    return (images * PATTERN + noise * (1 - PATTERN)).mul(255).to(torch.uint8)
