"""AlexNet in two columns, each on a device of its own: model parallelism inside a worker.

In Krizhevsky, Sutskever and Hinton, "ImageNet classification with deep convolutional neural networks" (NIPS 2012), two GPUs of
3 GB share the network. Each has half of every layer's outputs, and only some layers see the other GPU's outputs. `alexnet` makes
the network for one device, with grouped convolutions for layers that see their own column only. `TwoColumns` divides it over two.
Both compute the same function, with the same random numbers, and have the same state.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from roundtable.common.runtime.devices import find_device
from roundtable.common.runtime.errors import UsageError
from roundtable.worker.model_contents import JOINED
from roundtable.worker.models.cnn_blocks import side_after

#: (first, second).
Devices = tuple[torch.device, torch.device]
#: The values of both columns: half of the maps or features on each device, or the same whole tensor for both.
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Convolution:
    """A convolution, its ReLU, and the layers that follow them."""

    #: Number of maps in both columns.
    maps: int
    #: Height and width of a filter, in pixels.
    field: int
    stride: int = 1
    padding: int = 0
    #: Whether the layer sees all maps before it, rather than those of its own column.
    sees_both: bool = False
    norm: bool = False
    #: Side and stride of a max-pooling, in pixels.
    pool: tuple[int, int] | None = None


@dataclass(frozen=True)
class Sizes:
    """The sizes of such a network. Hidden layers are fully connected, with ReLU and dropout behind them."""

    convolutions: tuple[Convolution, ...]
    hidden: tuple[int, ...] = (4096, 4096)


#: The paper's sizes, with its response normalisation and overlapping pools. The paper says 224x224; its 55x55 maps need a padding
#: of 2. 60,965,224 parameters.
PAPER = Sizes(
    (
        Convolution(96, 11, stride=4, padding=2, sees_both=True, norm=True, pool=(3, 2)),
        Convolution(256, 5, padding=2, norm=True, pool=(3, 2)),
        Convolution(384, 3, padding=1, sees_both=True),
        Convolution(384, 3, padding=1),
        Convolution(256, 3, padding=1, pool=(3, 2)),
    )
)
#: The sizes of the text from which this project grew: smaller filters, pools of 2x2, and no normalisation. The text has no
#: strides and no padding. These make maps as large as the paper's behind each pool (docs/tutorial/built-in-networks.md).
#: 60,740,968 parameters.
TEXT = Sizes(
    (
        Convolution(96, 5, stride=4, sees_both=True, pool=(2, 2)),
        Convolution(256, 3, padding=1, pool=(2, 2)),
        Convolution(384, 3, padding=1, sees_both=True),
        Convolution(384, 3, padding=1),
        Convolution(256, 3, padding=1, pool=(2, 2)),
    )
)


class ResponseNorm(nn.LocalResponseNorm):
    """The paper's local response normalisation, over neighbouring maps of one column.

    Unlike torch's, its alpha is not divided by the number of neighbours.
    """

    def __init__(self, columns: int) -> None:
        super().__init__(size=5, alpha=5 * 1e-4, beta=0.75, k=2.0)
        self.columns = columns

    def forward(self, maps: Tensor) -> Tensor:
        """Return the normalised maps, float (B, C, H, W) with C divided among the columns, in the same shape."""
        batch, channels, height, width = maps.shape
        apart = maps.reshape(batch * self.columns, channels // self.columns, height, width)
        return super().forward(apart).view(maps.shape)


def alexnet(sizes: Sizes, shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """Return the network for one device: float32 (B, *shape) to logits (B, classes). Layers are named conv1, relu1, norm1,
    pool1 ...

    Dropout of one half follows the hidden layers, as in the paper. torch's defaults draw the weights.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels, rows, columns = shape
    for n, c in enumerate(sizes.convolutions, 1):
        groups = 1 if c.sees_both else 2
        layers[f"conv{n}"] = nn.Conv2d(channels, c.maps, c.field, c.stride, c.padding, groups=groups)
        layers[f"relu{n}"] = nn.ReLU(inplace=True)
        channels, rows, columns = c.maps, *(side_after(side, c.field, c.stride, c.padding) for side in (rows, columns))
        if c.norm:
            layers[f"norm{n}"] = ResponseNorm(columns=2)
        if c.pool is not None:
            layers[f"pool{n}"] = nn.MaxPool2d(*c.pool)
            rows, columns = side_after(rows, *c.pool), side_after(columns, *c.pool)
    layers["flatten"] = nn.Flatten()
    inputs = channels * rows * columns
    first = len(sizes.convolutions) + 1
    for n, outputs in enumerate(sizes.hidden, first):
        layers[f"fc{n}"] = nn.Linear(inputs, outputs)
        layers[f"relu{n}"] = nn.ReLU(inplace=True)
        layers[f"dropout{n}"] = nn.Dropout(0.5)
        inputs = outputs
    layers[f"fc{first + len(sizes.hidden)}"] = nn.Linear(inputs, classes)
    return nn.Sequential(layers)


class TwoColumns(nn.Module):
    """A network of `alexnet`, divided over two devices, which may be the same one. The weights are copied.

    The forward takes images on any device and returns logits on the first. The state (`state_dict`) is that of the whole
    network, so a file of either can be loaded into the other. `parameters()` are the halves, each on its device.
    """

    def __init__(self, whole: nn.Sequential, devices: Devices) -> None:
        super().__init__()
        self.devices = devices
        self.layers = nn.Sequential()
        sees_both = False  # the image is in both columns already
        for name, layer in whole.named_children():
            self.layers.add_module(name, _divide(layer, devices, sees_both))
            sees_both = True
        self.register_state_dict_post_hook(_join_state)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_divide_state)  # type: ignore[no-untyped-call]

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) for float32 (B, C, H, W)."""
        first, second = self.layers((_move(images, self.devices[0]), _move(images, self.devices[1])))
        return torch.cat([first, _move(second, self.devices[0])], 1)


class _Apart(nn.ModuleList):
    """One layer in each column."""

    def forward(self, columns: Pair) -> Pair:
        first, second = self
        return first(columns[0]), second(columns[1])


class _Both(_Apart):
    """One layer in each column. Both see the previous outputs of both columns."""

    def forward(self, columns: Pair) -> Pair:
        first, second = columns
        whole = torch.cat([first, _move(second, first.device)], 1)
        if first.device == second.device:
            return super().forward((whole, whole))
        return super().forward((whole, torch.cat([_move(first, second.device), second], 1)))


class _Dropout(nn.Module):
    """Dropout over both columns, drawn at once on the first device, like that of the whole network."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, columns: Pair) -> Pair:
        if not self.training:
            return columns
        first, second = columns
        widths = first.shape[1], second.shape[1]
        one, other = functional.dropout(first.new_ones(len(first), sum(widths)), self.p).split(widths, 1)
        return first * one, second * _move(other, second.device)


def parse_devices(text: str) -> Devices:
    """Return the two devices in "cuda:0,cuda:1" or "cpu,cpu". Raises UsageError if there are not two, or one does not exist."""
    names = [name.strip() for name in text.split(",")]
    if len(names) != 2:
        raise UsageError(f"devices is '{text}': two columns need two devices, such as cuda:0,cuda:1 or cpu,cpu.")
    first, second = (find_device(name, "devices") for name in names)
    return first, second


def _move(x: Tensor, device: torch.device) -> Tensor:
    """Return `x` on that device. Only a copy from a GPU to the CPU is waited for, because it may be read at once."""
    return x.to(device, non_blocking=device.type != "cpu")


def _divide(layer: nn.Module, devices: Devices, sees_both: bool) -> nn.Module:
    """Return a layer of the whole network, divided over both columns."""
    match layer:
        case nn.Conv2d():
            kind = _Both if sees_both and layer.groups == 1 else _Apart
            return kind([_half(layer, number, device) for number, device in enumerate(devices)])
        case nn.Linear():
            return _Both([_half(layer, number, device) for number, device in enumerate(devices)])
        case nn.Dropout():
            return _Dropout(layer.p)
        case ResponseNorm():
            return _Apart([ResponseNorm(columns=1), ResponseNorm(columns=1)])
        case _:  # a layer without weights that does not look across columns
            return _Apart([layer, layer])


def _half(layer: nn.Conv2d | nn.Linear, number: int, device: torch.device) -> nn.Module:
    """Return the half of the layer that makes the outputs of column `number`."""
    state = {name: tensor.chunk(2)[number].to(device, copy=True) for name, tensor in layer.state_dict().items()}
    outputs, inputs = state["weight"].shape[:2]
    half: nn.Module
    if isinstance(layer, nn.Linear):
        half = nn.Linear(inputs, outputs, device="meta")
    else:
        half = nn.Conv2d(inputs, outputs, layer.kernel_size, layer.stride, layer.padding, device="meta")  # type: ignore[arg-type]
    half.load_state_dict(state, assign=True)
    return half


def whole_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the whole network's tensors from those of the halves, by the names of `parameters()`, which checkpoints use.

    Tensors of other models stay as they are.
    """
    whole: dict[str, Tensor] = {}
    for name in sorted(state):  # the first half first
        half = re.fullmatch(r"layers\.(\w+)\.[01]\.(\w+)", name)
        key = f"{half[1]}.{half[2]}" if half is not None else name
        whole[key] = torch.cat([whole[key], state[name]]) if key in whole else state[name]
    return whole


def _join_state(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Replace the halves by the whole network's tensors, on the first device."""
    for whole, (first, second) in _names(module, prefix).items():
        halves = state.pop(first), state.pop(second)
        state[whole] = torch.cat([halves[0], halves[1].to(halves[0].device)])
        setattr(state[whole], JOINED, halves)


def _divide_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Replace the whole network's tensors, as far as there are any, by the halves."""
    for whole, halves in _names(module, prefix).items():
        if whole in state:
            state.update(zip(halves, state.pop(whole).chunk(2), strict=True))


def _names(module: nn.Module, prefix: str) -> dict[str, list[str]]:
    """Return the names of both halves of each tensor, by its name in the whole network."""
    names: dict[str, list[str]] = {}
    for name, _ in module.named_parameters():
        layer, _, tensor = name.removeprefix("layers.").rsplit(".", 2)
        names.setdefault(f"{prefix}{layer}.{tensor}", []).append(prefix + name)
    return names
