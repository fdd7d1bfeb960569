"""Images to train on, by name.

To add a source, add a file to `sources`: `my_scans.py` with a function `load` is `my-scans`. For --data, also add the name to
`DataName` in `common/config/example_settings.py`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from roundtable.common.config.example_settings import parse_shape
from roundtable.common.config.settings import Settings
from roundtable.common.runtime.errors import UsageError
from roundtable.worker.data import sources
from roundtable.worker.data.formats.images import Images, Request, Sample, Samples

__all__ = ["Images", "Sample", "Samples", "chosen", "load", "names"]


def names() -> list[str]:
    """Return the names that `load` knows, sorted."""
    found = (module.name for module in pkgutil.iter_modules(sources.__path__))
    return sorted(name.replace("_", "-") for name in found)


def chosen(settings: Settings) -> Images:
    """Return the images that a run's settings name, by `load`."""
    example = settings.example
    shape = parse_shape(example.image) if example.image is not None else None
    return load(example.data, example.data_dir, settings.seed, shape=shape, classes=example.classes)


def load(
    name: str,
    data_dir: str | None,
    seed: int,
    augment: bool = True,
    shape: tuple[int, int, int] | None = None,
    classes: int | None = None,
) -> Images:
    """Return the training and held-out images called `name`.

    `data_dir` is the folder of the files, for sources that read any; others ignore it. `seed` draws the images of `synthetic`.
    No other source depends on it, so held-out images are the same in every run. If `augment`, sources with a recipe vary
    training images at random, by torch's global generator; only `cifar-10` has one. `shape` (C, H, W) and `classes` are for
    sources that accept any: `synthetic`, and `folder` for height and width.

    Raises UsageError for an unknown name, and for files that are missing, damaged or of another kind. A shape or a number of
    classes that the source does not have is an error too.
    """
    if name not in names():
        raise UsageError(f"there is no data source '{name}'; there are {', '.join(names())}.")
    module = importlib.import_module(f"{sources.__name__}.{name.replace('-', '_')}")
    source: Callable[[Request], Images] = module.load
    images = source(Request(name, data_dir, seed, augment, shape, classes))
    if shape not in (None, images.shape):
        channels, height, width = images.shape
        raise UsageError(f"the images of '{name}' are {channels}x{height}x{width}: leave out --image, or use --data synthetic.")
    if classes not in (None, images.classes):
        raise UsageError(f"the images of '{name}' have {images.classes} classes: leave out --classes, or use --data synthetic.")
    return images
