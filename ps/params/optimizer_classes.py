"""The classes of optimizers that a server has: those of torch.optim, and those of modules that its user trusts."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch

from roundtable.common.protocol.messages.setup import Update
from roundtable.common.runtime.errors import WireError

#: Stands for any module.
ANY_MODULE = "*"


def import_classes(update: Update, trusts: Collection[str]) -> None:
    """Import the modules of all classes of an update. Those of torch.optim have no module in their name.

    Raises WireError if a module is not among those that this server `trusts`, or cannot be imported.
    """
    for name in sorted({*update.classes, update.optimizer or ""}):
        module = name.rpartition(".")[0]
        if not module:
            continue
        if ANY_MODULE not in trusts and not any(module == known or module.startswith(f"{known}.") for known in trusts):
            raise WireError(f"the optimizer {name} is not one that this server trusts: start it with --trust-optimizers {module}")
        try:
            importlib.import_module(module)
        except Exception as error:  # the module may raise anything
            raise WireError(f"the optimizer {name} cannot be imported on this server: {type(error).__name__}: {error}") from None


def class_named(name: str | None) -> type[torch.optim.Optimizer]:
    """Return a class of torch.optim by its name, or of a module that is imported by its path.

    Raises ValueError if there is none.
    """
    module, _, last = (name or "").rpartition(".")
    found = getattr(sys.modules.get(module) if module else torch.optim, last, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        where = module or f"torch.optim of torch {torch.__version__}"
        raise ValueError(f"{where} has no optimizer '{last}'")
    return found


def with_tuples(hypers: Mapping[str, Any]) -> dict[str, Any]:
    """MessagePack has no tuples; torch.optim expects them (betas)."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in hypers.items()}
