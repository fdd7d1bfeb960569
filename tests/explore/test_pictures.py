"""Pictures show images as they are and names as they are written."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from matplotlib.text import Text

from roundtable.explore import pictures
from roundtable.explore.pictures import drawable, figure, save, to_pixels
from roundtable.worker.data import load


def test_drawn_images_are_shown_as_they_were_drawn() -> None:
    images = load("synthetic", None, seed=0, shape=(3, 20, 20), classes=4)
    image, _ = images.train[7]
    assert image.min() < -1 and image.max() > 1
    assert torch.allclose(torch.from_numpy(to_pixels(image, images.train)).permute(2, 0, 1), image * 0.25 + 0.5, atol=1e-6)


@pytest.mark.parametrize("name", ["猫", "$x", "a_{", "$\\frac$", "ärger", "日本 $"])
def test_names_in_any_script_are_drawn_without_a_word(name: str, tmp_path: Path) -> None:
    made = figure(4, 3)
    axes = made.subplots()
    axes.set_xlabel(name)
    axes.set_xticks([0, 1], [drawable(name), "b"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(made, tmp_path / "names.png")
    assert [text for text in made.findobj(Text) if isinstance(text, Text) and text.get_text() == drawable(name)]


def test_characters_that_no_font_has_become_their_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_family_with", lambda char: "DejaVu Sans" if ord(char) < 0x2000 else None)
    assert drawable("猫 é\n1") == "U+732B é\n1"
