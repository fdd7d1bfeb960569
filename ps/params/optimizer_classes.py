"""The classes of optimizers that a server has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def class_named(name: str | None) -> type[torch.optim.Optimizer]:
    """Return a class of torch.optim by its name. Raises ValueError if there is none."""
    found = getattr(torch.optim, name or "", None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ValueError(f"torch.optim of torch {torch.__version__} has no optimizer '{name}'")
    return found


def with_tuples(hypers: Mapping[str, Any]) -> dict[str, Any]:
    """MessagePack has no tuples; torch.optim expects them (betas)."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in hypers.items()}
