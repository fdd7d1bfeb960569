"""The nearest images are the nearest, a layer's features find more of a class than pixels do, and the galleries show it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from roundtable.explore.features import Features
from roundtable.explore.pictures import ask, to_pixels
from roundtable.explore.similar import Neighbours, chance, command, measure, raw_pixels
from roundtable.explore.trained import Source, Trained

pytestmark = pytest.mark.slow

GENERATOR = torch.Generator().manual_seed(0)


def no_cluster(*_: object) -> None:
    raise AssertionError("the features are there already")


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_exact_search_finds_what_comparing_with_all_finds(metric: Literal["cosine", "euclidean"]) -> None:
    points, queries = torch.randn(300, 20, generator=GENERATOR), torch.randn(40, 20, generator=GENERATOR)
    if metric == "euclidean":
        apart = torch.cdist(queries, points)
    else:
        apart = 1 - torch.nn.functional.cosine_similarity(queries[:, None], points[None], dim=2)
    index = Neighbours(points, metric, approximate=False)
    rows = index.nearest(queries, 5)
    assert np.array_equal(rows, apart.argsort(1)[:, :5].numpy())
    assert np.allclose(index.distances(queries[0], rows[0]), apart[0].sort().values[:5].numpy(), atol=1e-5)


def test_the_approximate_search_finds_nearly_all_of_them(features: Features) -> None:
    train, test = features.part(False), features.part(True)
    exact, approximate = measure("relu4", train, test, 8, "cosine")
    assert exact.recall == 1 and approximate.recall > 0.95


def test_features_find_more_of_a_digit_than_raw_pixels_do_and_both_far_more_than_chance(run: Trained, features: Features) -> None:
    train, test = features.part(False), features.part(True)
    pixels = [
        Features(raw_pixels(s), p.labels, p.indices, p.held_out) for s, p in ((run.images.train, train), (run.images.test, test))
    ]
    raw, _ = measure("raw pixels", pixels[0], pixels[1], 8, "cosine")
    learnt, _ = measure("relu4", train, test, 8, "cosine")
    assert abs(chance(train, test) - 0.1) < 1e-6
    assert 0.8 < raw.precision < learnt.precision


def test_precision_is_the_share_of_the_nearest_with_the_label_of_the_query() -> None:
    def images(values: list[float], labels: list[int]) -> Features:
        count = len(values)
        return Features(torch.tensor(values)[:, None], torch.tensor(labels), torch.arange(count), torch.zeros(count))

    found, _ = measure("line", images([0, 1, 10, 11], [0, 0, 1, 0]), images([0.1, 10.1], [0, 1]), 2, "euclidean")
    assert (found.first, found.precision) == (1.0, 0.75)
    assert chance(images([0, 1, 2, 3], [0, 0, 1, 0]), images([0, 1], [0, 1])) == 0.5


def save_training_image(run: Trained, number: int, path: Path) -> None:
    pixels = to_pixels(run.images.train[number][0], run.images.train)
    Image.fromarray((pixels[..., 0] * 255).round().astype(np.uint8)).save(path)


def test_an_image_of_the_set_finds_itself_at_distance_0(run: Trained, tmp_path: Path) -> None:
    save_training_image(run, 1234, tmp_path / "digit.png")
    lines = command(
        Source(str(run.folder)),
        [str(tmp_path / "digit.png"), "7"],
        None,
        4,
        "euclidean",
        False,
        True,
        2,
        tmp_path / "out",
        no_cluster,
    )
    table = [line for line in lines if line.startswith("| ")]
    assert [re.split(r" *\| *", line)[1:4:2] for line in table[1:]] == [
        ["raw pixels", "exact"], ["raw pixels", "approximate"], ["relu4", "exact"], ["relu4", "approximate"],
    ]  # fmt: skip
    page = (tmp_path / "out" / "gallery.html").read_text()
    captions = re.findall("<figcaption>(.*?)</figcaption>", page)
    assert len(captions) == 2 * (1 + 4)
    assert captions[0] == "digit.png"
    label, number, distance = captions[1].split(", ")
    assert (label, number) == (str(run.images.train[1234][1]), "#1234") and float(distance) < 1e-3
    distances = [float(caption.split(", ")[2]) for caption in captions[6:]]
    assert distances == sorted(distances)


class Sources(HTMLParser):
    """Return the addresses that a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_nothing_beside_it_and_shows_the_very_pixels(run: Trained, features: Features, tmp_path: Path) -> None:
    command(Source(str(run.folder)), ["42"], "relu4", 3, "cosine", True, False, 2, tmp_path, no_cluster)
    sources = Sources()
    sources.feed((tmp_path / "gallery.html").read_text())
    assert len(sources.found) == 4 and all(source.startswith("data:image/png;base64,") for source in sources.found)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(sources.found[0].partition(",")[2]))))
    images = run.images
    assert shown.shape == (28, 28, 3)
    assert np.array_equal(shown, (to_pixels(images.test[42][0], images.test) * 255).round().astype(np.uint8))


def test_the_picture_shows_every_image_that_was_found(run: Trained, tmp_path: Path) -> None:
    """A digit is white on black: there is about as much black in a gallery as images."""
    black = {}
    for k in (2, 6):
        command(Source(str(run.folder)), ["3", "500"], "relu4", k, "cosine", False, False, 2, tmp_path, no_cluster)
        with Image.open(tmp_path / "gallery.png") as picture:
            assert picture.width > 800 and picture.height > 300
            black[k] = np.mean(np.asarray(picture.convert("RGB")).max(2) < 10) * picture.width * picture.height
    assert black[2] > 6 * 4000 and 1.5 < black[6] / black[2] < 3.5


def test_a_file_is_made_what_the_network_has_seen_and_the_user_is_told(run: Trained, tmp_path: Path) -> None:
    save_training_image(run, 5, tmp_path / "same.png")
    same = ask(str(tmp_path / "same.png"), run.images)
    assert same.note == "" and torch.allclose(same.image, run.images.train[5][0], atol=1e-5)
    Image.new("RGB", (50, 20), (255, 255, 255)).save(tmp_path / "wide.png")
    wide = ask(str(tmp_path / "wide.png"), run.images)
    assert tuple(wide.image.shape) == (1, 28, 28) and float(wide.image.std()) < 1e-5
    assert "50x20" in wide.note and "stretched to 28x28" in wide.note


def test_what_cannot_be_found_is_refused(folder: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    (tmp_path / "text.png").write_text("no image")
    assert "cannot be read as an image" in refusal("similar", folder, tmp_path / "text.png")
    assert "0 to 999" in refusal("similar", folder, "1000")
    assert "no image lost.png" in refusal("similar", folder, "lost.png")
    assert "only 4000 images" in refusal("similar", folder, "0", "-k", 4001)
