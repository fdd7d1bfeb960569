"""The result of a data source, the request to it, and the data set class that most sources use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from roundtable.common.runtime.errors import UsageError

#: One image, float32 (C, H, W), about zero mean and unit variance over the data set, and its label, 0 <= label < classes.
Sample = tuple[Tensor, int]


class Samples(Dataset[Sample]):
    """A map-style data set that knows its length."""

    #: A pixel value v, 0 to 1, becomes (v - mean) / std in a Sample. There is one mean and std per channel.
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        raise NotImplementedError


@dataclass(frozen=True)
class Images:
    """A data set to train on and the held-out one to measure on."""

    name: str
    train: Samples
    test: Samples
    #: Labels are 0 .. classes - 1.
    classes: int
    #: (channels, height, width) of every image, in pixels.
    shape: tuple[int, int, int]
    #: The names of the classes, if they are known.
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """A request to a source. The fields are the arguments of `roundtable.worker.data.load`."""

    name: str
    data_dir: str | None
    seed: int
    augment: bool
    shape: tuple[int, int, int] | None = None
    classes: int | None = None

    def folder(self) -> Path:
        """Return the folder to read. Raises UsageError if none was given or it does not exist."""
        if self.data_dir is None:
            raise UsageError(f"the data source '{self.name}' reads files: name the folder that holds them with --data-dir.")
        folder = Path(self.data_dir)
        if not folder.is_dir():
            raise UsageError(f"there is no folder {folder}; --data-dir takes the folder that holds the files of '{self.name}'.")
        return folder


class TensorImages(Samples):
    """Images that are kept in memory as bytes and converted to float32 one at a time.

    `pixels` is uint8 (N, C, H, W) and `labels` int64 (N). A pixel p becomes (p / white - mean) / std, with one `mean` and `std`
    per channel. Before that, `vary` is applied to the uint8 (C, H, W) image.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        white: int = 255,
        vary: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.pixels = pixels
        self.labels = labels
        self.mean, self.std = mean, std
        self._black = torch.tensor(mean).view(-1, 1, 1) * white
        self._scale = 1 / (torch.tensor(std).view(-1, 1, 1) * white)
        self._vary = vary

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Sample:
        image = self.pixels[index]
        if self._vary is not None:
            image = self._vary(image)
        return (image.to(torch.float32) - self._black) * self._scale, int(self.labels[index])


def shape_of(images: TensorImages) -> tuple[int, int, int]:
    """Return (channels, height, width) of every image."""
    _, channels, height, width = images.pixels.shape
    return channels, height, width
