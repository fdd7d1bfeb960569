"""The names of a model's tensors: those that its script gave them, without what torch.compile puts in between."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

_COMPILED = re.compile(r"(?:^|(?<=\.))_orig_mod(?:\.|$)")


def plain(name: str) -> str:
    """Take out of a tensor's or a module's name what it has because a part of the model is compiled."""
    return _COMPILED.sub("", name).removesuffix(".")


def parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Give each parameter of `model` once, by the first of its names."""
    return ((plain(name), parameter) for name, parameter in model.named_parameters())


def buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Likewise each buffer."""
    return ((plain(name), buffer) for name, buffer in model.named_buffers())


def uncompiled(model: nn.Module) -> nn.Module:
    """Find the model inside of what torch.compile makes of it: the same parameters, by the names that the script gave them."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model
