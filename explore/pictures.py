"""Turn images into the numbers that a network takes, and into the pixels that a person sees."""

from __future__ import annotations

import base64
import functools
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.data import Images, Samples
from roundtable.worker.data.image_files import read_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pixels = npt.NDArray[np.float32]

Colour = tuple[float, float, float]
#: RGB of the outside of an image, and of the space between images: colours that grey images do not have.
OUTSIDE: Colour = (0.80, 0.87, 0.97)
BETWEEN: Colour = (0.42, 0.55, 0.75)

#: This font comes with matplotlib.
_USUAL_FONT = "DejaVu Sans"


def to_pixels(image: Tensor, samples: Samples) -> Pixels:
    """Return a sample's image (C, H, W) as float32 (H, W, 3), 0 to 1. Unless C is 1 or 3, it is the mean over channels."""
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (samples.mean, samples.std))
    shown = (image.cpu() * std + mean).clamp(0, 1)
    shown = shown if len(shown) in (1, 3) else shown.mean(0, keepdim=True)
    return np.ascontiguousarray(shown.expand(3, -1, -1).permute(1, 2, 0).numpy())


@dataclass(frozen=True)
class Asked:
    """An image to look at. `number` is its number among the held-out images, None for a file. `note` says how it was changed."""

    name: str
    image: Tensor
    label: int | None = None
    number: int | None = None
    note: str = ""


def ask(text: str, images: Images) -> Asked:
    """Return the image that `text` names: a file's path, or else the number of a held-out image.

    A file is made grey or RGB and stretched to the size of the others, and `note` says so. Raise UsageError if `text` is neither,
    or if the file cannot be read as an image.
    """
    path, held_out = Path(text), len(images.test)
    if path.exists() or not text.isdecimal():
        return _from_file(path, images)
    if int(text) >= held_out:
        raise UsageError(f"there is no held-out image {text}: they are numbered 0 to {held_out - 1}.")
    image, label = images.test[int(text)]
    return Asked(f"held-out {text}", image, label, int(text))


def _from_file(path: Path, images: Images) -> Asked:
    channels, height, width = images.shape
    if not path.is_file():
        held_out = f"the number of a held-out image, 0 to {len(images.test) - 1}"
        raise UsageError(f"there is no image {path}; an image is a file's path, or {held_out}.")
    if channels not in (1, 3):
        raise UsageError(f"the images of '{images.name}' have {channels} channels, so a file cannot be one of them.")
    picture = read_image(path, "L" if channels == 1 else "RGB")
    note = ""
    if picture.size != (width, height):
        note = f"{path.name} was {picture.width}x{picture.height} and has been stretched to {width}x{height}"
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(picture)).view(height, width, channels).permute(2, 0, 1)
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (images.train.mean, images.train.std))
    return Asked(path.name, ((pixels / 255 - mean) / std).contiguous(), note=note)


def label_text(label: int, images: Images) -> str:
    """Return the name of a label's class."""
    return images.names[label] if images.names else str(label)


def data_uri(pixels: Pixels) -> str:
    """Return an image (H, W, 3), 0 to 1, as the text of a PNG for a page."""
    data = io.BytesIO()
    Image.fromarray((pixels * 255).round().astype(np.uint8)).save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def figure(width: float, height: float) -> Figure:
    """Return an empty figure of that many inches. It needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def save(made: Figure, path: Path) -> Path:
    """Write the figure as a PNG. Raise UsageError if that fails."""
    _write_names_as_they_are(made)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made.savefig(path, dpi=120, facecolor="white")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}.") from None
    return path


def _write_names_as_they_are(made: Figure) -> None:
    """Draw each text with fonts that have its characters, and take no `$` for the beginning of a formula."""
    from matplotlib.text import Text

    for text in made.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
        text.set_text(drawable(text.get_text()))
        text.set_fontfamily(list(dict.fromkeys([_USUAL_FONT, *filter(None, map(_family_with, text.get_text()))])))


def drawable(text: str) -> str:
    """Return the text with a code, such as U+732B, for each character that no font of this machine has."""
    return "".join(char if char.isspace() or _family_with(char) else f"U+{ord(char):04X}" for char in text)


@functools.cache
def _family_with(char: str) -> str | None:
    """Return a family of fonts on this machine that has the character, the usual one if possible."""
    return next((family for family, path in _fonts().items() if ord(char) in _characters(path)), None)


@functools.cache
def _fonts() -> dict[str, str]:
    """Return family → file of each usable font, the usual one first, without the font whose glyphs are all boxes."""
    from matplotlib.font_manager import fontManager

    found = {font.name: font.fname for font in fontManager.ttflist if not font.name.startswith("Last Resort")}
    return {_USUAL_FONT: fontManager.findfont(_USUAL_FONT), **found}


@functools.cache
def _characters(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(path).get_charmap())


def tiles(pictures: list[Pixels], columns: int, between: Colour, gap: int = 1) -> Pixels:
    """Return pictures (H, W, 3) of one size in rows of `columns`, with `gap` pixels of one colour around each."""
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    sheet = np.empty((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), np.float32)
    sheet[:] = between
    for at, picture in enumerate(pictures):
        top, left = at // columns * (height + gap) + gap, at % columns * (width + gap) + gap
        sheet[top : top + height, left : left + width] = picture
    return sheet
