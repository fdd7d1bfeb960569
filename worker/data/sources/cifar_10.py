"""CIFAR-10: 50,000 photographs to train on and 10,000 to test on, from its unpacked binary or Python batches."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.data.formats.images import Images, Request, TensorImages
from roundtable.worker.data.formats.pickled import ByteArray, read_batch

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
TRAIN = [f"data_batch_{n}" for n in range(1, 6)]
TEST = ["test_batch"]
#: Pixels by which a training image may be shifted in each direction.
SHIFT = 4


def load(request: Request) -> Images:
    """Return 3x32x32 images of ten classes. If `request.augment`, training images are shifted and mirrored at random.

    Raises UsageError with the file that is missing or damaged.
    """
    folder = _batches(request.folder())
    train = TensorImages(*_read(folder, TRAIN), MEAN, STD, vary=shift_and_flip if request.augment else None)
    return Images(request.name, train, TensorImages(*_read(folder, TEST), MEAN, STD), classes=10, shape=SHAPE)


def shift_and_flip(image: Tensor) -> Tensor:
    """Return an image (C, H, W) shifted by up to SHIFT pixels, with a black border, and mirrored half of the time.

    This is the usual augmentation. It draws three numbers per image from torch's global generator.
    """
    _, height, width = image.shape
    down, right = (int(n) for n in torch.randint(2 * SHIFT + 1, (2,)))
    mirrored = bool(torch.randint(2, ()))
    framed = functional.pad(image, (SHIFT, SHIFT, SHIFT, SHIFT))
    moved = framed[:, down : down + height, right : right + width]
    return moved.flip(2) if mirrored else moved


def _batches(root: Path) -> Path:
    """Return the folder under `root` that has the batches."""
    places = [root, root / "cifar-10-batches-bin", root / "cifar-10-batches-py"]
    for place in places:
        if any((place / name).is_file() for first in TRAIN[:1] + TEST for name in (first, f"{first}.bin")):
            return place
    packed = sorted(root.glob("cifar-10-*.tar.gz"))
    if packed:
        raise UsageError(f"{packed[0]} is still packed: unpack it there with tar -xzf {packed[0].name}.")
    raise UsageError(
        f"{root} holds no data_batch_1.bin and no data_batch_1: unpack cifar-10-binary.tar.gz or cifar-10-python.tar.gz there."
    )


def _read(folder: Path, names: list[str]) -> tuple[Tensor, Tensor]:
    """Return uint8 (N, 3, 32, 32) and int64 (N) from batches of either kind."""
    parts = [_read_one(folder, name) for name in names]
    return torch.cat([pixels for pixels, _ in parts]), torch.cat([labels for _, labels in parts])


def _read_one(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    binary, pickled = folder / f"{name}.bin", folder / name
    if not binary.is_file() and not pickled.is_file():
        raise UsageError(f"there is no {binary} and no {pickled}, which CIFAR-10 has: unpack the whole archive again.")
    path = binary if binary.is_file() else pickled
    return _read_binary(path) if path == binary else _read_pickled(path)


def _read_binary(path: Path) -> tuple[Tensor, Tensor]:
    """Read a file of records, each with a label and 3072 bytes of pixels."""
    try:
        data = bytearray(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error}): unpack the archive again.") from None
    if not data or len(data) % (1 + PIXELS) != 0:
        raise UsageError(
            f"{path} is damaged: its {len(data)} bytes are not whole images of {1 + PIXELS} bytes; unpack the archive again."
        )
    records = torch.frombuffer(data, dtype=torch.uint8).view(-1, 1 + PIXELS)
    if int(records[:, 0].max()) > 9:
        raise UsageError(f"{path} is no CIFAR-10 batch, because it has labels above 9: unpack the archive again.")
    return records[:, 1:].reshape(-1, *SHAPE), records[:, 0].to(torch.int64)


def _read_pickled(path: Path) -> tuple[Tensor, Tensor]:
    """Read a pickled dictionary of `data`, bytes (N, 3072), and `labels`, a list of N integers, 0 to 9."""
    batch = read_batch(path)
    data, labels = batch.get("data"), batch.get("labels")
    if (
        not isinstance(data, ByteArray)
        or not isinstance(labels, list)
        or not labels
        or not all(isinstance(label, int) and 0 <= label <= 9 for label in labels)
        or data.shape != (len(labels), PIXELS)
        or len(data.data) != len(labels) * PIXELS
    ):
        raise UsageError(
            f"{path} is no CIFAR-10 batch, which has a label, 0 to 9, for each image of {PIXELS} bytes: unpack the archive again."
        )
    return torch.frombuffer(bytearray(data.data), dtype=torch.uint8).view(-1, *SHAPE), torch.tensor(labels)
