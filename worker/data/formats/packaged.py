"""Tables of digits inside installed packages, and their fixed split into training and held-out samples.

The packages' own loaders take two seconds of CPU for parsing or importing. This takes a tenth of that, which counts if every
worker of a run loads the data at once. The packages are located but not imported.
"""

from __future__ import annotations

import gzip
import importlib.util
import warnings
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from roundtable.common.runtime.errors import UsageError
from roundtable.common.runtime.extras import require
from roundtable.worker.data.formats.images import Images, Request, TensorImages, shape_of

#: Draws the held-out samples. It never changes, so that results of different runs are comparable.
SPLIT_SEED = 20260101


def load_digits(
    request: Request, package: str, file: str, side: int, white: int, held_out: int, mean: float, std: float
) -> Images:
    """Return digits from the gzipped CSV `file` of `package`: rows of side*side grey values, 0 to `white`, and the label, 0 to 9.

    `held_out` samples of each class are held out. Raises UsageError if the package lacks the file, or if the file is damaged.
    """
    table = read_table(package_file(package, file), columns=side * side + 1)
    labels = table[:, -1]
    if table.min() < 0 or table[:, :-1].max() > white or labels.max() > 9:
        raise UsageError(f"the {file} of the package {package} holds values that are no digits: reinstall {package}.")
    train, test = split(labels, held_out)
    pixels = torch.from_numpy(table[:, :-1].astype(np.uint8)).view(-1, 1, side, side)

    def part(rows: npt.NDArray[np.int64]) -> TensorImages:
        return TensorImages(pixels[rows], torch.from_numpy(labels[rows]), (mean,), (std,), white)

    train_images = part(train)
    return Images(request.name, train_images, part(test), classes=10, shape=shape_of(train_images))


def package_file(package: str, file: str) -> Path:
    """Return the path of `file` in an installed package. Raises UsageError if the package is not installed or lacks the file."""
    require("this data set", package)
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise UsageError(f"there is no {path}, so this version of {package} lacks the images: install another version of it.")
    return path


def read_table(path: Path, columns: int) -> npt.NDArray[np.int64]:
    """Return the (rows, columns) integers of a gzipped CSV file without a header. Raises UsageError if it is something else."""
    try:
        text = gzip.decompress(path.read_bytes()).decode("ascii").strip()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # for text that is no number, numpy only warns
            values: npt.NDArray[np.int64] = np.fromstring(text.replace("\n", ","), dtype=np.int64, sep=",")
    except (OSError, EOFError, ValueError, zlib.error, DeprecationWarning) as error:
        raise UsageError(f"{path} is damaged ({error}): reinstall the package that it belongs to.") from None
    if values.size == 0 or values.size % columns != 0 or text.count("\n") + 1 != values.size // columns:
        raise UsageError(f"{path} is damaged (it is not a table of {columns} columns): reinstall the package that it belongs to.")
    return values.reshape(-1, columns)


def split(labels: npt.NDArray[np.int64], held_out: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return row numbers for training, and `held_out` of each class for testing. Both ascend and are equal in every process.

    RandomState is used because numpy promises that its numbers never change. Newer generators have no such promise.
    """
    random = np.random.RandomState(SPLIT_SEED)
    drawn = [random.permutation(np.flatnonzero(labels == label))[:held_out] for label in np.unique(labels)]
    test = np.sort(np.concatenate(drawn))
    return np.setdiff1d(np.arange(len(labels)), test), test
