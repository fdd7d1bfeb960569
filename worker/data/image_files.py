"""Reading image files that other people made."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from roundtable.common.runtime.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

#: File name endings of images, and the decoders that may open them. Pillow has more, some of which start other programs.
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
#: Pixels of an image file at most: larger ones take gigabytes and minutes.
MOST_PIXELS = 50_000_000
#: What a 16-bit grey value is divided by, so that white is 255.
_TO_8_BITS = 257


def read_image(path: Path, mode: str) -> Image.Image:
    """Read a file as an upright image of `mode`, "L" (grey) or "RGB", with 8 bits a channel.

    Values of 16-bit grey images are scaled to 8 bits. Raises UsageError, which names the file, where it cannot be read, is too
    large, or has grey values of 32 bits, of which nobody says how large white is.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours is the tighter limit
            opened = Image.open(path, formats=FORMATS)
        with opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise UsageError(
                    f"{path} has {opened.width}x{opened.height} pixels; {MOST_PIXELS} are the most: make it smaller or remove it."
                )
            return _in_8_bits(ImageOps.exif_transpose(opened), path, opened.format in ("PNG", "PPM")).convert(mode)
    except UsageError:
        raise
    except Exception as error:  # of a damaged file, Pillow's decoders may raise nearly anything
        raise UsageError(f"{path} cannot be read as an image ({error}): replace or remove it.") from None


def _in_8_bits(image: Image.Image, path: Path, at_most_16_bits: bool) -> Image.Image:
    """The image with 8 bits a channel. Some formats have at most 16 bits, whatever Pillow calls them."""
    if image.mode.startswith("I;16") or (image.mode == "I" and at_most_16_bits):
        from PIL import Image

        values = np.asarray(image).astype(np.float32) / _TO_8_BITS
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UsageError(f"{path} has grey values of 32 bits, so how large white is is not known: save it with 8 or 16 bits.")
    return image
