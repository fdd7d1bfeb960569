"""Images to train on, by name. Adding a source is adding a file here: `my_scans.py` with a function `load` is `my-scans`.

Files whose names start with an underscore are helpers, not sources.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from common.errors import UsageError
from worker.data._images import Images, Request, Sample, Samples

__all__ = ["Images", "Sample", "Samples", "load", "names"]


def names() -> list[str]:
    """The names that `load` knows, sorted."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in found if not name.startswith("_"))


def load(name: str, data_dir: str | None, seed: int, augment: bool = True) -> Images:
    """The training and held-out images called `name`.

    `data_dir` is the folder that holds the files, for the sources that read any (the others ignore it). `seed` draws the
    images of `synthetic`; no other source depends on it, so held-out images stay held out from run to run. `augment`
    varies training images at random where the source has a recipe for that, which of these only `cifar-10` has; it draws
    from torch's global generator.

    Raises UsageError for an unknown name, and for files that are missing, damaged or not what they should be.
    """
    if name not in names():
        raise UsageError(f"there is no data source '{name}'; there are {', '.join(names())}.")
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    source: Callable[[Request], Images] = module.load
    return source(Request(name=name, data_dir=data_dir, seed=seed, augment=augment))
