"""The layers of a model: their names, their outputs, and the part of the image that a unit sees."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.models.layer_names import short_name, short_names

_WINDOWS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def last_hidden(model: nn.Module) -> str:
    """Return the layer before the last fully connected one, without dropout. Raise UsageError if there is none."""
    modules = dict(model.named_modules())
    names = list(short_names(model).values())
    dense = [at for at, name in enumerate(names) if isinstance(modules[name], nn.Linear)]
    before = [name for name in names[: dense[-1]] if not isinstance(modules[name], nn.Dropout)] if dense else []
    if not before:
        raise UsageError("the model has no layer before a last fully connected one: say with --layer whose output to compare.")
    return before[-1]


@contextlib.contextmanager
def recording(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that gets copies of the outputs of `layers` in the last forward, in the order of computation."""
    seen: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                seen[name] = output.detach().clone()  # the next layer may work in place

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def features_of(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """Return the output of `layer` for `images` (B, C, H, W), flattened: float32 (B, D) on the CPU.

    Raise UsageError if the layer gives no tensor with a row for each image.
    """
    with torch.no_grad(), recording(model, [layer]) as seen:
        model(images)
    output = seen.get(layer)
    if output is None or output.dim() == 0 or len(output) != len(images):
        called = short_name(model, layer)
        raise UsageError(f"the layer '{called}' gives no tensor with a row for each image, so it has no features.")
    return output.reshape(len(images), -1).to("cpu", torch.float32)


@dataclass(frozen=True)
class Field:
    """The fields of a layer's units, in pixels (rows, columns): unit (i, j) sees `size` from (start + (i, j)*stride) on.

    `start` is negative if the first units see padding.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    start: tuple[int, int]

    def box(self, row: int, column: int) -> tuple[slice, slice]:
        """Return the rows and columns that a unit sees. They may reach beyond the image."""
        top, left = self.start[0] + row * self.stride[0], self.start[1] + column * self.stride[1]
        return slice(top, top + self.size[0]), slice(left, left + self.size[1])


def receptive_field(model: nn.Module, layer: str, image: Tensor) -> Field:
    """Return the receptive field of the units of `layer`, from kernel, stride, padding and dilation of the layers before.

    One forward with `image` (1, C, H, W) finds these layers. See Araujo, Norris and Sim, "Computing receptive fields of
    convolutional neural networks" (2019). Raise UsageError unless they are a chain of convolutions, poolings and pointwise
    layers.
    """
    size, stride, start = [1, 1], [1, 1], [0, 0]
    for name, module, before, after in _chain(model, layer, image):
        if isinstance(module, _WINDOWS):
            for axis in range(2):
                kernel, step, pad, dilation = _window(module, axis)
                size[axis] += (kernel - 1) * dilation * stride[axis]
                start[axis] -= pad * stride[axis]
                stride[axis] *= step
        elif after.dim() != 4 or before.shape[2:] != after.shape[2:] or isinstance(module, nn.AdaptiveAvgPool2d):
            before_it, called = short_name(model, name), short_name(model, layer)
            raise UsageError(f"'{before_it}', a {type(module).__name__}, leaves no maps of places in the image to '{called}'.")
    return Field((size[0], size[1]), (stride[0], stride[1]), (start[0], start[1]))


def _chain(model: nn.Module, layer: str, image: Tensor) -> list[tuple[str, nn.Module, Tensor, Tensor]]:
    """Return the innermost modules up to `layer`, with inputs and outputs. Each input must be the output before."""
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def note(name: str) -> Any:
        return lambda module, inputs, output: calls.append((name, module, inputs[0], output))

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(note(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    at = next((at for at, call in enumerate(calls) if call[0] == layer), None)
    if at is None:
        called = short_name(model, layer)
        raise UsageError(f"'{called}' is no single layer of the model's forward, so what its units see is not known.")
    given, giver = image, "the image"
    for name, _, before, after in calls[: at + 1]:
        taker, called = short_name(model, name), short_name(model, layer)
        if before is not given:
            raise UsageError(
                f"'{taker}' does not get what {giver} gives as it is, so what the units of '{called}' see is not known."
            )
        given, giver = after, f"'{taker}'"
    return calls[: at + 1]


def _window(module: nn.Module, axis: int) -> tuple[int, int, int, int]:
    """Return kernel, stride, padding before, and dilation, along rows (0) or columns (1)."""

    def along(value: Any) -> int:
        return int(value[axis] if isinstance(value, tuple | list) else value)

    kernel, dilation = along(module.kernel_size), along(getattr(module, "dilation", 1))
    padding: Any = module.padding
    if isinstance(padding, str):
        padding = dilation * (kernel - 1) // 2 if padding == "same" else 0
    return kernel, along(module.stride), along(padding), dilation
