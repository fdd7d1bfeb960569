"""MNIST: 60,000 handwritten digits to train on and 10,000 to test on, from its four IDX files."""

from __future__ import annotations

from roundtable.worker.data.formats.idx import load_idx
from roundtable.worker.data.formats.images import Images, Request


def load(request: Request) -> Images:
    """Return 1x28x28 images of ten classes. Raises UsageError with the file that is missing or damaged."""
    return load_idx(request, "MNIST", mean=0.1307, std=0.3081)
