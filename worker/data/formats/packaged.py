"""Tables of digits that come inside installed packages, and the fixed split of them into training and held-out samples.

The packages' own loaders take two seconds of CPU, parsing or importing; here it is a tenth of that, which counts when
every worker of a run loads the data at once. The packages are located but not imported.
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

#: Draws the held-out samples. Fixed for good: figures are comparable between runs only where they are held out from all.
SPLIT_SEED = 20260101


def load_digits(
    request: Request, package: str, file: str, side: int, white: int, held_out: int, mean: float, std: float
) -> Images:
    """Digits from the gzipped CSV `file` of `package`: rows of side*side grey values, 0 to `white`, and the label, 0 to 9.

    `held_out` samples of each class are held out. Raises UsageError where the package lacks the file or it is damaged.
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
    """The path of `file` in an installed package. Raises UsageError where the package is not installed or lacks it."""
    require("this data set", package)
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise UsageError(f"there is no {path}: this version of {package} lacks the images that others come with, so change it.")
    return path


def read_table(path: Path, columns: int) -> npt.NDArray[np.int64]:
    """The (rows, columns) integers of a gzipped CSV file without a header. Raises UsageError where it is no such thing."""
    try:
        text = gzip.decompress(path.read_bytes()).decode("ascii").strip()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy only warns of text that is no number
            values: npt.NDArray[np.int64] = np.fromstring(text.replace("\n", ","), dtype=np.int64, sep=",")
    except (OSError, EOFError, ValueError, zlib.error, DeprecationWarning) as error:
        raise UsageError(f"{path} is damaged ({error}): reinstall the package that it belongs to.") from None
    if values.size == 0 or values.size % columns != 0 or text.count("\n") + 1 != values.size // columns:
        raise UsageError(f"{path} is damaged (it is not a table of {columns} columns): reinstall the package that it belongs to.")
    return values.reshape(-1, columns)


def split(labels: npt.NDArray[np.int64], held_out: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row numbers for training and, `held_out` of each class, for testing; both ascending, the same in every process.

    RandomState and no newer generator, because numpy promises that its numbers never change.
    """
    random = np.random.RandomState(SPLIT_SEED)
    drawn = [random.permutation(np.flatnonzero(labels == label))[:held_out] for label in np.unique(labels)]
    test = np.sort(np.concatenate(drawn))
    return np.setdiff1d(np.arange(len(labels)), test), test
