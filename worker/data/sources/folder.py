"""Your own images, in one folder per class.

Either `train/<class>/*` with `test/<class>/*` or `val/<class>/*` beside it, or no more than one such tree, at `train` or at
the top, of which a fifth of each class is then held out. What is held out follows from the files' names alone, so
it is the same in every process and every run.
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

#: Height and width, in pixels, that images are stretched to where no shape is asked for.
SIDE = 64


def load(request: Request) -> Images:
    """3xSIDExSIDE, or of the height and width asked for; classes are the folders' names in alphabetical order.

    Raises UsageError where there are no images, or held-out ones of a class that is not trained on.
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
    """Images that are read from their files one at a time, made RGB and stretched to `height` x `width`; pixels are -1 to 1.

    Getting one raises UsageError naming the file where that can't be read as an image.
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
    """The image files in each folder in `top` that has any, sorted, by the folder's name."""
    try:
        folders = [path for path in sorted(top.iterdir()) if path.is_dir() and not path.name.startswith(".")]
        files = {folder.name: sorted(path for path in folder.iterdir() if _is_image(path)) for folder in folders}
    except OSError as error:
        raise UsageError(f"the folders of images in {top} cannot be listed: {error}.") from None
    return {name: paths for name, paths in files.items() if paths}


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _hold_out(files: dict[str, list[Path]]) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Training and held-out files: a fifth of each class, those whose names hash lowest."""
    train, test = {}, {}
    for name, paths in files.items():
        by_hash = sorted(paths, key=lambda path: hashlib.sha256(f"{path.parent.name}/{path.name}".encode()).digest())
        held = min(max(1, round(len(paths) / 5)), len(paths) - 1)
        train[name], test[name] = sorted(by_hash[held:]), sorted(by_hash[:held])
    return train, test
