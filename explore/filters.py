"""Draw a convolution: its filters before and after training, maps of an image, and the patches that excite a filter most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib import colormaps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from roundtable.common.runtime.errors import UsageError
from roundtable.explore.layers import Field, receptive_field, recording
from roundtable.explore.pictures import BETWEEN, OUTSIDE, Asked, Pixels, ask, drawable, figure, label_text, save, tiles, to_pixels
from roundtable.explore.trained import Source, Trained, checkpoints_of, open_run, weights_at
from roundtable.worker.data import Samples
from roundtable.worker.models.layer_names import find_layer, short_name, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: The most filters drawn of a first layer and of a deeper one, the most inputs of each, and the most filters with patches.
_FIRST, _DEEPER, _INPUTS, _EXCITED = 64, 12, 16, 16
#: The most patches of a filter, and the most maps of a layer.
_PATCHES, _MAPS = 9, 12
#: The most classes whose names stand under the last layer.
_NAMED = 20
_GREY, _WHITE = (0.6, 0.6, 0.6), (1.0, 1.0, 1.0)
#: The most images that are searched for patches.
_SEARCHED = 10_000


@dataclass(frozen=True)
class Stage:
    """A convolution's weights (out, in, rows, columns) at one time."""

    when: str
    weights: Tensor


def command(source: Source, layer: str, image: str, also: Sequence[Path], out: Path | None) -> list[str]:
    """Run `launch.py filters`: write three pictures, and return the lines to print."""
    run = open_run(source)
    model = weights_at(run, "last")
    layer = find_layer(model, layer)
    _convolution(model, layer)
    asked = ask(image, run.images)
    last = Stage("after training", _convolution(model, layer))
    during = [(f"{path.parent.name}/{path.name}", path) for path in also]
    during += [(path.name, path) for path in checkpoints_of(run) if path not in also]
    stages = [Stage(when, _convolution(weights_at(run, path), layer)) for when, path in during]
    stages = [stage for stage in stages if not torch.equal(stage.weights, last.weights)]  # the last checkpoint equals it
    stages = [Stage("before training", _convolution(weights_at(run, "first"), layer)), *stages, last]
    folder, name = out or run.folder / "filters", short_name(model, layer)
    draw_filters(stages, f"Filters of {name}", folder / f"filters-{name}.png")
    draw_maps(run, model, asked, folder / f"maps-{Path(asked.name).stem.replace(' ', '-')}.png")
    notes = [asked.note] if asked.note else []
    if len(stages) == 2:
        notes.append("there is no checkpoint from during training: set --checkpoint-every and --keep-checkpoints to have some.")
    try:
        draw_patches(run, model, layer, folder / f"patches-{name}.png")
    except UsageError as error:
        notes.append(f"there are no patches: {error}")
    return [*(f"note: {note}" for note in notes), f"the pictures are in {folder}"]


def _convolution(model: nn.Module, layer: str) -> Tensor:
    """Return the weights of a layer. Raise UsageError if the layer is not a 2-D convolution."""
    module = dict(model.named_modules())[layer]
    if not isinstance(module, nn.Conv2d):
        there = [short for short, name in short_names(model).items() if isinstance(dict(model.named_modules())[name], nn.Conv2d)]
        has = f"those of this model are {', '.join(there)}" if there else "this model has none"
        called = short_name(model, layer)
        raise UsageError(f"the layer '{called}' is a {type(module).__name__}; only convolutions have filters to draw, and {has}.")
    return module.weight.detach()


def filter_pictures(weights: Tensor) -> list[Pixels]:
    """Return each filter of (out, in, rows, columns) as pixels, scaled by its own largest weight.

    Filters of three inputs are in colour, and grey is 0. In filters of one input, negative weights are blue and positive ones
    red. Of other filters the first inputs are drawn so, side by side.
    """
    scaled = (weights / weights.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)).cpu().numpy()
    if weights.shape[1] == 3:
        return [np.ascontiguousarray(one.transpose(1, 2, 0) / 2 + 0.5) for one in scaled]
    coloured = colormaps["RdBu_r"](scaled / 2 + 0.5)[..., :3].astype(np.float32)
    inputs = min(weights.shape[1], _INPUTS)
    return list(coloured[:, 0]) if inputs == 1 else [tiles(list(one[:inputs]), inputs, _GREY) for one in coloured]


def draw_filters(stages: Sequence[Stage], title: str, path: Path) -> Path:
    """Draw the same filters at several times, beside each other."""
    count, inputs = stages[0].weights.shape[:2]
    plain = inputs in (1, 3)
    shown = min(count, _FIRST if plain else _DEEPER)
    columns = int(np.ceil(np.sqrt(shown))) if plain else 1
    made = figure(max(8, 4.4 * len(stages)), 5.4)
    for axes, stage in zip(made.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        pictures = filter_pictures(stage.weights)[:shown]
        axes.imshow(tiles(pictures, columns, _WHITE if inputs == 3 else _GREY), interpolation="nearest")
        axes.set_title(stage.when, fontsize=11)
        axes.set_axis_off()
        _number(axes, pictures[0], range(shown), columns)
    what = f"Shown are {_of(shown, count)}, numbered from 0" + (
        "" if plain else f"; a row has {_of(min(inputs, _INPUTS), inputs, 'input')}"
    )
    colours = "grey is 0" if inputs == 3 else "blue is negative, white 0, red positive"
    made.suptitle(title, fontsize=13)
    made.supxlabel(f"{what}.\nEach filter is scaled by its own largest weight: {colours}.", fontsize=9)
    return save(made, path)


def _of(shown: int, count: int, what: str = "filter") -> str:
    return f"{shown} of {count} {what}s" if shown < count else f"all {count} {what}s"


def _number(axes: Axes, picture: Pixels, numbers: Sequence[int], columns: int) -> None:
    """Write numbers into tiles of the size of `picture`, or before them if there is one tile a row."""
    height, width = picture.shape[0] + 1, picture.shape[1] + 1
    for at, number in enumerate(numbers):
        row, column = divmod(at, columns)
        if columns == 1:
            axes.text(-width / 60, row * height + height / 2, str(number), ha="right", va="center", fontsize=8)
        else:
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
            axes.text(column * width + 0.7, row * height + 0.7, str(number), ha="left", va="top", fontsize=6, bbox=box)


def draw_maps(run: Trained, model: nn.Module, asked: Asked, path: Path) -> Path:
    """Draw the output of each layer for one image, a row for each layer."""
    names = [name for name in short_names(model).values()]
    kinds = dict(model.named_modules())
    layers = [name for name in names if not isinstance(kinds[name], nn.Dropout | nn.Flatten)]
    with torch.no_grad(), recording(model, layers) as seen:
        logits = model(asked.image[None])
    heights = [1.0, *(1.0 if output.dim() == 4 else 0.45 for output in seen.values())]
    made = figure(11, 0.9 * sum(heights) + 1)
    grid = made.add_gridspec(len(seen) + 1, _MAPS + 2, height_ratios=heights)
    axes = made.add_subplot(grid[0, 2])
    axes.imshow(to_pixels(asked.image, run.images.test), interpolation="nearest")
    axes.set_axis_off()
    _label(made.add_subplot(grid[0, :2]), "the image", "x".join(map(str, run.images.shape)))
    for row, (name, output) in enumerate(seen.items(), 1):
        values = output[0].float().cpu().numpy()
        _label(made.add_subplot(grid[row, :2]), short_name(model, name), "x".join(map(str, values.shape)))
        limit = float(np.abs(values).max()) or 1.0
        low, colours = (-limit, "RdBu_r") if values.min() < 0 else (0.0, "magma")
        maps = list(values[:_MAPS]) if values.ndim == 3 else []
        for column, one in enumerate(maps):
            axes = made.add_subplot(grid[row, column + 2])
            axes.imshow(one, cmap=colours, vmin=low, vmax=limit, interpolation="nearest")
            axes.set_axis_off()
        if not maps:
            axes = made.add_subplot(grid[row, 2:])
            axes.imshow(values.reshape(1, -1), cmap=colours, vmin=low, vmax=limit, interpolation="nearest", aspect="auto")
            axes.set(xticks=[], yticks=[])
    if logits.dim() == 2 and logits.shape[1] == run.images.classes <= _NAMED:
        names = [drawable(label_text(label, run.images)) for label in range(run.images.classes)]
        axes.set_xticks(range(run.images.classes), names)
    answer = label_text(int(logits[0].argmax()), run.images) if logits.dim() == 2 else "no label"
    right = "" if asked.label is None else f" (its label is {label_text(asked.label, run.images)})"
    made.suptitle(f"{asked.name}, layer by layer; the network's answer is {answer}{right}", fontsize=12)
    made.supxlabel(
        f"The first {_MAPS} maps of each layer, each layer scaled by its largest value: where there are negative ones, blue is\n"
        "negative, white 0, red positive; elsewhere black is 0, bright large. Layers without maps are strips, a unit a column.",
        fontsize=9,
    )
    return save(made, path)


def _label(axes: Axes, name: str, shape: str) -> None:
    axes.set_axis_off()
    axes.text(0.95, 0.5, f"{name}\n{shape}", ha="right", va="center", fontsize=8)


@dataclass(frozen=True)
class Peaks:
    """The strongest unit of each filter in each image: its output, and its place. All are (N images, filters)."""

    values: Tensor
    rows: Tensor
    columns: Tensor


def find_peaks(model: nn.Module, layer: str, samples: Samples, numbers: Sequence[int]) -> Peaks:
    """Return the peaks in the images `numbers` of `samples`."""
    parts = []
    for images, _ in DataLoader(Subset(samples, numbers), batch_size=64):
        with torch.no_grad(), recording(model, [layer]) as seen:
            model(images)
        maps = seen[layer]
        values, places = maps.flatten(2).max(2)
        parts.append((values, places // maps.shape[3], places % maps.shape[3]))
    values, rows, columns = (torch.cat(part) for part in zip(*parts, strict=True))
    return Peaks(values, rows, columns)


def cut(pixels: Pixels, field: Field, row: int, column: int) -> Pixels:
    """Return the part of an image (H, W, 3) that a unit sees, (*field.size, 3). Beyond the image, pixels are OUTSIDE."""
    rows, columns = field.box(row, column)
    patch = np.empty((*field.size, 3), np.float32)
    patch[:] = OUTSIDE
    top, left = max(rows.start, 0), max(columns.start, 0)
    inside = pixels[top : max(rows.stop, 0), left : max(columns.stop, 0)]
    top, left = top - rows.start, left - columns.start
    patch[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return patch


def draw_patches(run: Trained, model: nn.Module, layer: str, path: Path) -> Path:
    """Draw, for each filter, the patches in which one of its units gives most, each of another image."""
    samples = run.images.train
    numbers = range(0, len(samples), -(-len(samples) // _SEARCHED))
    field = receptive_field(model, layer, samples[0][0][None])
    peaks = find_peaks(model, layer, samples, numbers)
    count = peaks.values.shape[1]
    shown = min(count, _EXCITED)
    best = peaks.values.topk(min(_PATCHES, len(numbers)), 0).indices
    weights = _convolution(model, layer)
    first = tuple(weights.shape[2:]) == field.size  # in the first layer a filter is as large as its field
    pictures = filter_pictures(weights)

    def row(one: int) -> list[Pixels]:
        places = zip(
            best[:, one].tolist(), peaks.rows[best[:, one], one].tolist(), peaks.columns[best[:, one], one].tolist(), strict=True
        )
        patches = [cut(to_pixels(samples[numbers[image]][0], samples), field, top, left) for image, top, left in places]
        return [pictures[one], *patches] if first else patches

    half = -(-shown // 2)
    made = figure(11, 0.62 * half + 1.4)
    for axes, part in zip(made.subplots(1, 2), (range(half), range(half, shown)), strict=True):
        axes.set_axis_off()
        lines = [tiles(row(one), len(best) + first, BETWEEN) for one in part]
        if lines:
            axes.imshow(tiles(lines, 1, _WHITE), interpolation="nearest")
            _number(axes, lines[0], part, 1)
    size = "x".join(map(str, field.size))
    made.suptitle(f"What excites the filters of {short_name(model, layer)} most", fontsize=13)
    made.supxlabel(
        f"Shown are {_of(shown, count)}, by number: in each row {'the filter, then ' if first else ''}the {len(best)} units that "
        f"give most in {len(numbers)} training images of {run.images.name},\none an image, the strongest first. A unit sees "
        f"{size} pixels, its receptive field; what lies outside of the image is pale blue.",
        fontsize=9,
    )
    return save(made, path)
