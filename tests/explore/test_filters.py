"""The pictures show the filters as they are, and the patches that excite them are cut where the network looked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from roundtable.cluster.run.run_directory import write_settings
from roundtable.common.config.settings import Settings
from roundtable.explore.filters import Stage, command, cut, draw_filters, filter_pictures, find_peaks
from roundtable.explore.layers import Field, receptive_field
from roundtable.explore.pictures import OUTSIDE, tiles
from roundtable.explore.trained import Source, Trained, weights_at

pytestmark = pytest.mark.slow


def test_a_filter_of_one_input_is_blue_white_and_red_by_its_own_largest_weight() -> None:
    small, large = filter_pictures(torch.tensor([[[[-1e-3, 0, 1e-3]]], [[[0.0, 5.0, 10.0]]]]))
    blue, white, red = small[0]
    assert blue[2] > blue[0] and red[0] > red[2] and white.min() > 0.95
    assert np.array_equal(large[0, 2], red) and small.shape == (1, 3, 3)


def test_a_filter_of_three_inputs_is_in_colour_and_grey_where_0() -> None:
    (one,) = filter_pictures(torch.tensor([[[[2.0, 0.0]], [[0.0, 0.0]], [[-2.0, 0.0]]]]))
    assert one.tolist() == [[[1.0, 0.5, 0.0], [0.5, 0.5, 0.5]]]


def test_inputs_of_a_deeper_filter_stand_side_by_side() -> None:
    (one,) = filter_pictures(torch.ones(1, 4, 5, 5))
    assert one.shape == (7, 1 + 4 * 6, 3)


def test_a_filter_of_zeros_can_be_drawn() -> None:
    assert np.isfinite(filter_pictures(torch.zeros(1, 1, 3, 3))[0]).all()


def test_tiles_stand_in_rows_with_a_colour_between() -> None:
    sheet = tiles([np.full((2, 2, 3), value, np.float32) for value in (0.1, 0.2, 0.3)], 2, (1, 1, 1))
    assert sheet.shape == (7, 7, 3)
    assert sheet[1, 1, 0] == np.float32(0.1) and sheet[1, 4, 0] == np.float32(0.2) and sheet[4, 1, 0] == np.float32(0.3)
    assert (sheet[3] == 1).all() and (sheet[4:, 4:] == 1).all()


def test_what_is_beyond_the_image_has_a_colour_of_its_own() -> None:
    image = np.zeros((6, 6, 3), np.float32)
    patch = cut(image, Field((4, 4), (2, 2), (-1, -1)), 0, 2)
    assert np.allclose(patch[0], OUTSIDE) and (patch[1:, :3] == 0).all() and np.allclose(patch[:, 3], OUTSIDE)
    assert np.allclose(cut(image, Field((2, 2), (1, 1), (-4, -4)), 0, 0), OUTSIDE)


def test_a_filter_on_the_patch_that_excites_it_most_gives_what_its_unit_gave(run: Trained) -> None:
    model, samples = weights_at(run, "last"), run.images.train
    numbers = range(0, 4000, 40)
    peaks = find_peaks(model, "3", samples, numbers)
    assert peaks.values.shape == (100, 32)
    field = receptive_field(model, "3", samples[0][0][None])
    before = model[:4]
    layers = [nn.Conv2d(*_sizes(layer)) if isinstance(layer, nn.Conv2d) else layer for layer in before]
    unpadded = nn.Sequential(*layers)
    unpadded.load_state_dict(before.state_dict())
    checked = 0
    for one in range(32):
        image = int(peaks.values[:, one].argmax())
        rows, columns = field.box(int(peaks.rows[image, one]), int(peaks.columns[image, one]))
        if min(rows.start, columns.start) >= 0 and max(rows.stop, columns.stop) <= 28:
            with torch.no_grad():
                given = unpadded(samples[numbers[image]][0][None, :, rows, columns])
            assert given.shape == (1, 32, 1, 1)
            assert given[0, one, 0, 0].item() == pytest.approx(peaks.values[image, one].item(), rel=1e-4)
            checked += 1
    assert checked > 10


def _sizes(layer: nn.Conv2d) -> tuple[int, int, int]:
    return layer.in_channels, layer.out_channels, int(layer.kernel_size[0])


def pixels_of(path: Path) -> npt.NDArray[np.int64]:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(np.int64)


def test_three_pictures_are_drawn(run: Trained, tmp_path: Path) -> None:
    lines = command(Source(str(run.folder)), "conv2", "901", [run.model_file], tmp_path)
    assert lines[-1] == f"the pictures are in {tmp_path}"
    for path in (tmp_path / f"{name}.png" for name in ("filters-conv2", "maps-held-out-901", "patches-conv2")):
        pixels = pixels_of(path)
        assert min(pixels.shape[:2]) > 500
        coloured = np.abs(pixels - pixels.mean(2, keepdims=True)).max(2) > 40
        assert coloured.mean() > 0.02 and (pixels.min(2) > 250).mean() > 0.1


def test_what_there_is_from_during_training_stands_between_and_who_has_none_is_told(
    run: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[str]] = []
    monkeypatch.setattr("roundtable.explore.filters.checkpoints_of", lambda run: [])
    monkeypatch.setattr(
        "roundtable.explore.filters.draw_filters", lambda stages, title, path: drawn.append([one.when for one in stages])
    )
    monkeypatch.setattr("roundtable.explore.filters.draw_maps", lambda *args: None)
    monkeypatch.setattr("roundtable.explore.filters.draw_patches", lambda *args: None)
    halfway = tmp_path / "halfway.safetensors"
    save_file({name: value / 2 for name, value in weights_at(run, "last").state_dict().items()}, halfway)
    told = [command(Source(str(run.folder)), "conv1", "901", also, tmp_path) for also in ([halfway], [])]
    assert drawn == [
        ["before training", f"{tmp_path.name}/halfway.safetensors", "after training"],
        ["before training", "after training"],
    ]
    assert [len(lines) for lines in told] == [1, 2] and "there is no checkpoint from during training" in told[1][0]


def test_filters_before_training_stand_left_of_those_after_it(run: Trained, tmp_path: Path) -> None:
    before, after = (weights_at(run, when).state_dict()["0.weight"] for when in ("first", "last"))

    def halves(*weights: torch.Tensor) -> list[npt.NDArray[np.int64]]:
        draw_filters([Stage("then", one) for one in weights], "filters", tmp_path / "filters.png")
        return np.split(pixels_of(tmp_path / "filters.png")[:, :1056], 2, axis=1)

    left, right = halves(before, after)
    same_left, same_right = halves(before, before)
    assert np.array_equal(left, same_left)
    assert (np.abs(right - same_right).max(2) > 20).mean() > 0.1


BRANCHED = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Conv2d(1, 1, 3, padding=1) for _ in range(3))
    def forward(self, x):
        return self.c(self.a(x) + self.b(x)).flatten(1)
"""


def test_without_a_chain_of_layers_the_other_pictures_are_drawn_and_the_user_is_told(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(BRANCHED)
    write_settings(tmp_path / "settings.toml", Settings(), "train.py")
    weights = {
        f"{name}.{kind}": torch.ones((1, 1, 3, 3) if kind == "weight" else 1) for name in "abc" for kind in ("weight", "bias")
    }
    save_file(weights, tmp_path / "model.safetensors")
    _, note, last = command(Source(str(tmp_path), "digits", None, f"{tmp_path}/net.py:Net"), "c", "0", [], None)
    assert note.startswith("note: there are no patches: 'conv2' does not get what 'conv1' gives")
    assert last == f"the pictures are in {tmp_path / 'filters'}"
    assert sorted(path.name for path in (tmp_path / "filters").iterdir()) == ["filters-conv3.png", "maps-held-out-0.png"]


def test_only_convolutions_have_filters(folder: Path, refusal: Callable[..., str]) -> None:
    text = refusal("filters", folder, "--layer", "fc1")
    assert "'fc1' is a Linear" in text and "conv1, conv2" in text
    assert "no file lost" in refusal("filters", folder, "--also", "lost")
