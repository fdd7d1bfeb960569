"""Images made up from a seed, for trying things out where there are no files: one blocky pattern per class, under noise."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.data._images import Images, Request, TensorImages

#: Height and width, in pixels, of the blocks that patterns are made of.
BLOCK = 4
#: How much of an image is its class's pattern; the rest is noise.
PATTERN = 0.2


def load(request: Request) -> Images:
    """1x28x28, ten classes, 2,000 images to train on and 500 held out."""
    return make(request.seed)


def make(seed: int, classes: int = 10, shape: tuple[int, int, int] = (1, 28, 28), train: int = 2000, test: int = 500) -> Images:
    """`train` and `test` images of that (C, H, W), all classes equally often. The same seed gives the same images."""
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = shape
    coarse = torch.rand(classes, channels, -(-height // BLOCK), -(-width // BLOCK), generator=generator)
    patterns = coarse.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[:, :, :height, :width]

    def part(count: int) -> TensorImages:
        labels = torch.arange(count) % classes
        return TensorImages(_noisy(patterns[labels], generator), labels, (0.5,) * channels, (0.25,) * channels)

    return Images("synthetic", part(train), part(test), classes, shape)


def _noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 of the shape of `images`, whose values are 0 to 1."""
    noise = torch.rand(images.shape, generator=generator)
    return (images * PATTERN + noise * (1 - PATTERN)).mul(255).to(torch.uint8)
