"""The short names of a model's layers for people: conv1, relu1, pool1, fc1, ..."""

from __future__ import annotations

from collections import Counter

from torch import nn

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.layers.sharded_linear import OnServers

#: The prefixes of short names. For other modules, the prefix is the name of the class.
_KINDS: dict[type[nn.Module], str] = {
    nn.Conv2d: "conv",
    nn.Linear: "fc",
    nn.BatchNorm2d: "bn",
    nn.MaxPool2d: "pool",
    nn.AvgPool2d: "pool",
    nn.AdaptiveAvgPool2d: "pool",
}


def short_names(model: nn.Module) -> dict[str, str]:
    """Return short name → name in `named_modules()`, for every module without children: conv1, relu1, pool1, fc1, ...

    Modules of one kind are numbered in the order of registration. In a Sequential, that is the order of the forward.
    """
    found: Counter[str] = Counter()
    names = {}
    for name, module in model.named_modules():
        if name and not list(module.children()):
            kind = "fc" if isinstance(module, OnServers) else _KINDS.get(type(module), type(module).__name__.lower())
            found[kind] += 1
            names[f"{kind}{found[kind]}"] = name
    return names


def find_layer(model: nn.Module, name: str) -> str:
    """Return the name in `named_modules()` of a layer, given by that or its short name. Raises UsageError with all names."""
    own = [known for known, _ in model.named_modules() if known]
    if name in own:
        return name
    short = short_names(model)
    if name in short:
        return short[name]
    inner = set(short.values())
    there = [f"{key} ({value})" if key != value else key for key, value in short.items()] + [
        known for known in own if known not in inner
    ]
    raise UsageError(f"the model has no layer '{name}'; there are {', '.join(there)}.")


def short_name(model: nn.Module, layer: str) -> str:
    """Return the short name of a layer, or its own name if it has none, such as a block of layers."""
    return next((short for short, name in short_names(model).items() if name == layer), layer)
