"""What the layers of a model are called wherever a person reads or writes of them: conv1, relu1, pool1, fc1, ..."""

from __future__ import annotations

from collections import Counter

from torch import nn

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.layers.sharded_linear import OnServers

#: What short names begin with; those of other kinds of modules begin with the name of their class.
_KINDS: dict[type[nn.Module], str] = {
    nn.Conv2d: "conv",
    nn.Linear: "fc",
    nn.BatchNorm2d: "bn",
    nn.MaxPool2d: "pool",
    nn.AvgPool2d: "pool",
    nn.AdaptiveAvgPool2d: "pool",
}


def short_names(model: nn.Module) -> dict[str, str]:
    """Short name → name in `named_modules()`, of every module that has none inside: conv1, relu1, pool1, fc1, ...

    Modules of a kind are counted in the order in which they are registered, which in a Sequential is that of the forward.
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
    """The name in `named_modules()` of the layer called `name`, there or in short. Raises UsageError with the names there are."""
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
    """The short name of a layer, or its own if it has none, as a block of layers."""
    return next((short for short, name in short_names(model).items() if name == layer), layer)
