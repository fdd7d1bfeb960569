"""Batches on a device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch


def move(batch: Any, device: torch.device, pin: bool = False) -> Any:
    """Return a batch whose tensors are on `device`, in whatever it nests them: mappings, lists, tuples, dataclasses.

    An object with a method `to`, such as a BatchEncoding of transformers, moves itself. Anything else stays as it is, and so
    does the whole batch if `device` is the CPU. With `pin`, tensors are copied to pinned memory before, unless they are there.
    The copies to a GPU do not block. This is untested on CUDA.
    """
    return batch if device.type == "cpu" else _moved(batch, device, pin)


def _moved(value: Any, device: torch.device, pin: bool) -> Any:
    if isinstance(value, torch.Tensor):
        is_pinned = not pin or value.device.type != "cpu" or value.is_pinned()
        return (value if is_pinned else value.pin_memory()).to(device, non_blocking=True)
    if callable(getattr(value, "to", None)):
        return value.to(device)
    if isinstance(value, MutableMapping):
        moved = copy.copy(value)
        moved.update({key: _moved(item, device, pin) for key, item in value.items()})
        return moved
    if isinstance(value, Mapping):
        return {key: _moved(item, device, pin) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(item, device, pin) for item in value))
    if isinstance(value, list | tuple):
        return type(value)([_moved(item, device, pin) for item in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed: Any = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(changed, field.name, _moved(getattr(value, field.name), device, pin))
        return changed
    return value
