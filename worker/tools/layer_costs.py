"""The costs of a network by layer, and what they would be with local or full connections: `launch.py inspect`.

Nothing is computed. The network is made on torch's device "meta", where tensors have only shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from roundtable.common.config.example_settings import parse_shape
from roundtable.common.runtime.errors import UsageError
from roundtable.worker import data
from roundtable.worker.layers.sharded_linear import OnServers
from roundtable.worker.models import builtin
from roundtable.worker.models.layer_names import short_names
from roundtable.worker.models.user_model import load_factory

#: Columns of the table if the output is not a terminal.
_WIDTH = 130


@dataclass(frozen=True)
class Weights:
    """Numbers of weights of one layer, without biases, for three kinds of connections."""

    #: Every output sees every input.
    full: int
    #: Every output sees a field of the inputs, padding included, with weights of its own.
    local: int
    #: All outputs of a map share their weights: a convolution.
    shared: int


def costs(inputs: int, positions: int, maps: int, field: int) -> Weights:
    """Return the weights between `inputs` and `maps` maps of `positions` outputs, each of which sees `field` inputs.

    For a grey image of 1000x1000 pixels and a map of as many outputs that see 10x10 pixels, costs(10**6, 10**6, 1, 100) is
    10**12, 10**8 or 100 weights. A fully connected layer has one position, and its field is all inputs.
    """
    outputs = positions * maps
    return Weights(full=inputs * outputs, local=outputs * field, shared=maps * field)


@dataclass(frozen=True)
class LayerCost:
    """The cost of one use of a layer on one image."""

    #: The short name, such as conv1.
    name: str
    #: The name in `named_modules()`.
    module: str
    #: The class of the layer.
    kind: str
    #: The output's shape without the batch.
    output: tuple[int, ...]
    #: Number of parameters, biases included; 0 if the layer was used before.
    parameters: int
    #: Multiply-adds of convolutions and fully connected layers; 0 for other layers, which have few.
    multiply_adds: int
    weights: Weights | None


def layers(model: nn.Module, shape: Sequence[int]) -> list[LayerCost]:
    """Return the costs of the layers of a model on "meta", in order of use, on one float32 image of that shape.

    Raises RuntimeError, ValueError or TypeError, like torch, if the model cannot take the image.
    """
    found: list[LayerCost] = []
    short = {name: short for short, name in short_names(model).items()}
    seen: set[int] = set()

    def used(name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        own = {id(p): p.numel() for p in layer.parameters(recurse=False) if id(p) not in seen}
        seen.update(own)
        size = tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else ()
        weights = _weights(layer, inputs[0].shape[1:], size) if inputs and isinstance(inputs[0], torch.Tensor) else None
        found.append(
            LayerCost(
                short.get(name, name),
                name,
                type(layer).__name__,
                size,
                sum(own.values()),
                weights.local if weights else 0,
                weights,
            )
        )

    handles = [
        layer.register_forward_hook(lambda layer, inputs, output, name=name: used(name, layer, inputs, output))
        for name, layer in model.named_modules()
        if not list(layer.children()) or list(layer.parameters(recurse=False))
    ]
    for layer in model.modules():
        if isinstance(layer, OnServers):  # compute it like an nn.Linear, because there are no servers
            layer.forward = partial(_plain, layer)
    training = model.training
    with torch.no_grad():
        model.eval()(torch.empty(1, *shape, device="meta"))
    model.train(training)
    for handle in handles:
        handle.remove()
    for layer in model.modules():
        if isinstance(layer, OnServers):
            del layer.forward
    return found


def _plain(layer: OnServers, features: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(features, layer.weight, layer.bias)


def _weights(layer: nn.Module, before: Sequence[int], after: Sequence[int]) -> Weights | None:
    """Return None for a layer that is no convolution and not fully connected. Each weight is used once at each position."""
    if isinstance(layer, _ConvNd) and not isinstance(layer, _ConvTransposeNd):
        return costs(math.prod(before), math.prod(after[1:]), after[0], layer.weight[0].numel())
    if isinstance(layer, nn.Linear | OnServers):
        return costs(math.prod(before), math.prod(after[:-1]), after[-1], layer.in_features)
    return None


def inspect(
    name: str, image: str | None, source: str | None, data_dir: str | None, classes: int | None, console: Console
) -> None:
    """Print the costs of a built-in model, or of the model that `FILE.py:FACTORY` makes.

    A built-in model is made for `image` and `classes`, or for those of the data `source`. The default is the usual image size
    of that model. Raises UsageError if something named does not exist, or if the model cannot take the images.
    """
    known = ((3, 224, 224), 1000) if name.startswith("alexnet") or ":" in name else ((1, 28, 28), 10)
    shape = parse_shape(image) if image is not None else None
    if source is not None:
        images = data.load(source, data_dir, seed=0, shape=shape, classes=classes)
        shape, classes = images.shape, images.classes
    shape, classes = shape or known[0], classes or known[1]
    size = "x".join(map(str, shape))
    own = ":" in name
    with torch.device("meta"):
        model = load_factory(name)() if own else builtin.build(name, shape, classes)
        try:
            found = layers(model, shape)
        except (RuntimeError, ValueError, TypeError) as error:
            raise UsageError(f"{name} cannot take an image of {size}: {str(error).strip().splitlines()[0]}.") from None
    title = f"{name} on an image of {size}" + ("" if own else f", {classes} classes")
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(title, highlight=False, soft_wrap=True)
    console.print(_table(found, sum(parameter.numel() for parameter in model.parameters())))
    example = costs(inputs=10**6, positions=10**6, maps=1, field=10 * 10)
    console.print(
        "Multiply-adds are those of convolutions and fully connected layers. Weights are without biases; if not shared, each is "
        f"used once. For comparison: from an image of 1000x1000 to 10^6 hidden units lead {example.full:,} weights, "
        f"{example.local:,} if each unit sees a field of 10x10, and {example.shared} if all units share their weights.",
        highlight=False,
    )


def _table(found: list[LayerCost], parameters: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_footer=True)
    weights = [layer.weights for layer in found if layer.weights is not None]
    columns: list[tuple[str, int | None]] = [
        ("output", None),
        ("parameters", parameters),
        ("multiply-adds", sum(layer.multiply_adds for layer in found)),
        ("weights", sum(w.shared for w in weights)),
        ("if not shared", sum(w.local for w in weights)),
        ("if fully connected", sum(w.full for w in weights)),
    ]
    table.add_column("layer", footer="sum")
    table.add_column("module")
    table.add_column("")
    for header, total in columns:
        table.add_column(header, justify="right", footer="" if total is None else f"{total:,}")
    for layer in found:
        w = layer.weights
        numbers = [layer.parameters, layer.multiply_adds, *((w.shared, w.local, w.full) if w is not None else ())]
        cells = [layer.name, layer.module, layer.kind, "x".join(map(str, layer.output))]
        table.add_row(*cells, *(f"{number:,}" if number else "" for number in numbers))
    return table
