"""The 1,797 small scans of digits that scikit-learn ships: 1,437 to train on, 360 held out."""

from __future__ import annotations

from roundtable.worker.data.formats.images import Images, Request
from roundtable.worker.data.formats.packaged import load_digits


def load(request: Request) -> Images:
    """Return 1x8x8 images of ten classes. No files are needed. Raises UsageError if scikit-learn lacks its table."""
    return load_digits(request, "sklearn", "datasets/data/digits.csv.gz", side=8, white=16, held_out=36, mean=0.3053, std=0.3760)
