"""The names of a model's tensors as its script gave them, without the additions of torch.compile."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

_COMPILED = re.compile(r"(?:^|(?<=\.))_orig_mod(?:\.|$)")


def plain(name: str) -> str:
    """Return the name of a tensor or module without the parts that torch.compile adds."""
    return _COMPILED.sub("", name).removesuffix(".")


def parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the name and value of each parameter of `model` once, by the first of its names."""
    return ((plain(name), parameter) for name, parameter in model.named_parameters())


def buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and value of each buffer of `model` once, by the first of its names."""
    return ((plain(name), buffer) for name, buffer in model.named_buffers())


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model inside a compiled one. It has the same parameters, by the names that the script gave them."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model
