"""The user's own images, in one folder per class.

There may be two trees: `train/<class>/*`, and `test/<class>/*` or `val/<class>/*` beside it. With only one tree, at `train` or
at the top, a fifth of each class is held out. The files' names alone decide which, so every process and every run holds out the
same.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from roundtable.common.runtime.errors import UsageError
from roundtable.common.runtime.extras import require
from roundtable.worker.data.formats.images import Images, Request, Sample, Samples
from roundtable.worker.data.image_files import SUFFIXES, read_image

#: Height and width, in pixels, that images are stretched to if no shape is given.
SIDE = 64


def load(request: Request) -> Images:
    """Return 3xSIDExSIDE images, or of the given height and width. Classes are the folders' names in alphabetical order.

    Raises UsageError if there are no images, or held-out images of a class without training images.
    """
    require("a folder of images", "PIL")
    root = request.folder()
    top = root / "train" if (root / "train").is_dir() else root
    train = _files_by_class(top)
    if len(train) < 2:
        raise UsageError(f"{top} must have two or more folders of images, one for each class, but it has {len(train)}.")
    apart = next((root / name for name in ("test", "val") if top != root and (root / name).is_dir()), None)
    if apart is None:
        train, test = _hold_out(train)
    else:
        test = _files_by_class(apart)
        if not test.keys() <= train.keys():
            unknown = min(test.keys() - train.keys())
            raise UsageError(f"{apart / unknown} is a class that {top} has no images of: add some, or remove it.")
    if not any(test.values()):
        raise UsageError(f"there are no images to hold out in {apart or top}: add some.")
    classes = sorted(train)
    _, height, width = request.shape or (3, SIDE, SIDE)
    samples, held_out = (FolderImages(files, classes, height, width) for files in (train, test))
    return Images(request.name, samples, held_out, len(classes), (3, height, width), tuple(classes))


class FolderImages(Samples):
    """Images that are read from their files one at a time, as RGB, stretched to `height` x `width`. Pixels are -1 to 1.

    Reading one raises UsageError with the file's name if it is no readable image.
    """

    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, files: dict[str, list[Path]], classes: list[str], height: int, width: int) -> None:
        self.files = [(path, label) for label, name in enumerate(classes) for path in files.get(name, [])]
        self._size = width, height

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        from PIL import Image

        path, label = self.files[index]
        image = read_image(path, "RGB").resize(self._size, Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels.to(torch.float32).div(127.5).sub(1).contiguous(), label


def _files_by_class(top: Path) -> dict[str, list[Path]]:
    """Return the sorted image files in each folder of `top` that has any, by the folder's name."""
    try:
        folders = [path for path in sorted(top.iterdir()) if path.is_dir() and not path.name.startswith(".")]
        files = {folder.name: sorted(path for path in folder.iterdir() if _is_image(path)) for folder in folders}
    except OSError as error:
        raise UsageError(f"the folders of images in {top} cannot be listed: {error}.") from None
    return {name: paths for name, paths in files.items() if paths}


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _hold_out(files: dict[str, list[Path]]) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Return training and held-out files. A fifth of each class is held out: the files whose names have the lowest hashes."""
    train, test = {}, {}
    for name, paths in files.items():
        by_hash = sorted(paths, key=lambda path: hashlib.sha256(f"{path.parent.name}/{path.name}".encode()).digest())
        held = min(max(1, round(len(paths) / 5)), len(paths) - 1)
        train[name], test[name] = sorted(by_hash[held:]), sorted(by_hash[:held])
    return train, test
