"""The networks of the built-in example, by name. They are plain modules that know nothing of distributed training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.models import alexnet_two_columns

#: (channels, height, width) of an image, in pixels.
Shape = tuple[int, int, int]


def build(name: str, shape: Shape, classes: int, devices: str | None = None) -> nn.Module:
    """Return a new network: float32 (B, *shape) to logits (B, classes). torch's global generator draws its weights.

    With `devices`, such as "cuda:0,cuda:1", its two columns are on these devices, with the same weights
    (`roundtable.worker.models.alexnet_two_columns`).

    Raises UsageError for an unknown name, and for images that are too small for the network. Devices that do not exist, or over
    which the network cannot be divided, are an error too.
    """
    if name not in MODELS:
        raise UsageError(f"there is no model '{name}'; there are {', '.join(sorted(MODELS))}.")
    smallest, make = MODELS[name]
    _, height, width = shape
    if min(height, width) < smallest:
        raise UsageError(f"the model '{name}' needs images of {smallest}x{smallest} or more, but these are {height}x{width}.")
    if devices is None:
        return make(shape, classes)
    pair = alexnet_two_columns.parse_devices(devices)
    if name not in TWO_COLUMNS:
        raise UsageError(f"the model '{name}' has no two columns to divide over {devices}; {' and '.join(TWO_COLUMNS)} have.")
    return alexnet_two_columns.TwoColumns(TWO_COLUMNS[name](shape, classes), pair)


def mlp(shape: Shape, classes: int) -> nn.Module:
    """Return a network with two hidden layers, of 256 and 128."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(shape[0] * shape[1] * shape[2], 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


def lenet(shape: Shape, classes: int) -> nn.Module:
    """Return LeNet-5 with today's ReLU and max-pooling, for digits and similar images.

    It has 16 and 32 channels. With the original's 6 and 16, some seeds stayed below 97 % on `mnist-5k`. For images smaller than
    12x12, the second convolution is padded too, because nothing would be left otherwise.
    """
    channels, height, width = shape
    pad = 2 if min(height, width) < 12 else 0
    rows, columns = ((side // 2 + 2 * pad - 4) // 2 for side in (height, width))
    return nn.Sequential(
        nn.Conv2d(channels, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=pad),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * rows * columns, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )


def cnn(shape: Shape, classes: int) -> nn.Module:
    """Return four convolutions with batch normalisation, and dropout: a network with buffers and random numbers."""
    channels, height, width = shape

    def convolution(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *convolution(channels, 32),
        *convolution(32, 32),
        nn.MaxPool2d(2),
        nn.Dropout(0.2),
        *convolution(32, 64),
        *convolution(64, 64),
        nn.MaxPool2d(2),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 256),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(256, classes),
    )


class AlexNet(nn.Module):
    """AlexNet in the single tower of "One weird trick", with torchvision's layer names and sizes.

    Images below 224x224 leave less than 6x6 after the convolutions, so the first dense layer is smaller.
    """

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        rows, columns = _alexnet_side(height), _alexnet_side(width)
        self.features = nn.Sequential(
            nn.Conv2d(channels, 64, 11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((rows, columns))
        self.classifier = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(256 * rows * columns, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (B, classes) for float32 (B, C, H, W)."""
        maps = self.avgpool(self.features(images))
        logits: torch.Tensor = self.classifier(maps.flatten(1))
        return logits


def _alexnet_side(side: int) -> int:
    """Return the rows (or columns) that reach the dense layers from `side` pixels: 6 at 224 and above, 1 at 64."""
    side = (side + 4 - 11) // 4 + 1
    for _ in range(3):
        side = (side - 3) // 2 + 1
    return min(side, 6)


#: Name → a function that makes a network that can be divided over two devices.
TWO_COLUMNS: Mapping[str, Callable[[Shape, int], nn.Sequential]] = {
    "alexnet-2012": partial(alexnet_two_columns.alexnet, alexnet_two_columns.PAPER),
    "alexnet-text": partial(alexnet_two_columns.alexnet, alexnet_two_columns.TEXT),
}
#: Name → the smallest height and width in pixels, and a function that makes the network.
MODELS: Mapping[str, tuple[int, Callable[[Shape, int], nn.Module]]] = {
    "alexnet": (64, AlexNet),
    "alexnet-2012": (63, TWO_COLUMNS["alexnet-2012"]),
    "alexnet-text": (33, TWO_COLUMNS["alexnet-text"]),
    "cnn": (4, cnn),
    "lenet": (4, lenet),
    "mlp": (1, mlp),
}
