"""Reading image files from unknown sources."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from roundtable.common.runtime.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

#: File name suffixes of images.
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
#: The decoders that may open them. Pillow has more, and some of these start other programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
#: Pixels of an image file at most. A larger image takes gigabytes and minutes.
MOST_PIXELS = 50_000_000
#: Divisor of 16-bit grey values, which makes white 255.
_TO_8_BITS = 257


def read_image(path: Path, mode: str) -> Image.Image:
    """Return the image in a file, upright, in `mode` "L" (grey) or "RGB", with 8 bits per channel.

    Values of 16-bit grey images are scaled to 8 bits. Raises UsageError, with the file's name, if the file cannot be read or is
    too large. Grey values of 32 bits are an error too, because their white is unknown.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower
            opened = Image.open(path, formats=FORMATS)
        with opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise UsageError(
                    f"{path} has {opened.width}x{opened.height} pixels; {MOST_PIXELS} are the most: make it smaller or remove it."
                )
            return _in_8_bits(ImageOps.exif_transpose(opened), path, opened.format in ("PNG", "PPM")).convert(mode)
    except UsageError:
        raise
    except Exception as error:  # for a damaged file, Pillow's decoders may raise almost anything
        raise UsageError(f"{path} cannot be read as an image ({error}): replace or remove it.") from None


def _in_8_bits(image: Image.Image, path: Path, at_most_16_bits: bool) -> Image.Image:
    """Return the image with 8 bits per channel. Some formats have at most 16 bits, even if Pillow gives them a wider mode."""
    if image.mode.startswith("I;16") or (image.mode == "I" and at_most_16_bits):
        from PIL import Image

        values = np.asarray(image).astype(np.float32) / _TO_8_BITS
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UsageError(f"{path} has grey values of 32 bits, so the value of white is not known: save it with 8 or 16 bits.")
    return image
