"""IDX, the file format of MNIST and of similar sets.

A file has the bytes 0, 0, 8 (for bytes), then the number of dimensions, each dimension as a big-endian uint32, and the data.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.data.formats.images import Images, Request, TensorImages, shape_of

#: A header with a larger size counts as damaged, and no memory is allocated for it.
MOST_BYTES = 2**31


def load_idx(request: Request, folder: str, mean: float, std: float) -> Images:
    """Return ten classes of grey images from the four usual files, plain or gzipped.

    The files are looked for in `folder`/raw and raw under the data folder, where torchvision puts them, then in `folder` and in
    the data folder itself. Raises UsageError with the first file that is missing, damaged or inconsistent with another.
    """
    root = request.folder()
    places = [root / folder / "raw", root / "raw", root / folder, root]

    def part(prefix: str) -> TensorImages:
        image_file = _find(request.name, places, f"{prefix}-images", 3)
        label_file = _find(request.name, places, f"{prefix}-labels", 1)
        pixels, labels = read_idx(image_file, 3), read_idx(label_file, 1)
        if len(pixels) != len(labels):
            raise UsageError(
                f"{image_file} has {len(pixels)} images but {label_file} has {len(labels)}: they are not of one set."
            )
        if int(labels.max()) > 9:
            raise UsageError(f"{label_file} has labels above 9, so it is not of '{request.name}': fetch the original again.")
        return TensorImages(pixels.unsqueeze(1), labels.to(torch.int64), (mean,), (std,))

    train, test = part("train"), part("t10k")
    if shape_of(train) != shape_of(test):
        raise UsageError(f"in {root}, training images are {shape_of(train)} but t10k images {shape_of(test)}: make them alike.")
    return Images(request.name, train, test, classes=10, shape=shape_of(train))


def _find(name: str, places: list[Path], stem: str, dimensions: int) -> Path:
    for place in places:
        for middle in (f"-idx{dimensions}-ubyte", f".idx{dimensions}-ubyte"):
            for path in (place / (stem + middle), place / (stem + middle + ".gz")):
                if path.is_file():
                    return path
    raise UsageError(
        f"'{name}' needs the file {stem}-idx{dimensions}-ubyte, plain or .gz, "
        f"which is neither in {places[-1]} nor in its {places[0].relative_to(places[-1])}: put it there."
    )


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Return the bytes of an IDX file as uint8 with that many dimensions.

    Raises UsageError if the file cannot be read, is no IDX file of bytes with that many dimensions, or has another length than
    its header says.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            sizes = _sizes(path, file.read(4 + 4 * dimensions), dimensions)
            promised = math.prod(sizes)
            body = file.read(promised + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read ({error}): fetch it again.") from None
    if len(body) != promised:
        found = "more" if len(body) > promised else f"only {len(body)}"
        raise UsageError(f"{path} is damaged: its header promises {promised} bytes but there are {found}; fetch it again.")
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(*sizes)


def _sizes(path: Path, header: bytes, dimensions: int) -> tuple[int, ...]:
    if header[:4] != bytes([0, 0, 8, dimensions]):
        raise UsageError(
            f"{path} is no IDX file of bytes in {dimensions} dimensions (it starts with {header[:4].hex() or 'nothing'}): "
            "fetch it again."
        )
    if len(header) != 4 + 4 * dimensions:
        raise UsageError(f"{path} is damaged: it ends in the middle of its header; fetch it again.")
    sizes: tuple[int, ...] = struct.unpack(f">{dimensions}I", header[4:])
    if not 0 < math.prod(sizes) <= MOST_BYTES:
        raise UsageError(f"{path} is damaged: its header says that it holds {'x'.join(map(str, sizes))} bytes; fetch it again.")
    return sizes
