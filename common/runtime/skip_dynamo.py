"""torch.optim without torch's compiler.

The first optimizer of a process imports the compiler, only to tell it to keep out. That takes 2 s of CPU and 60 MiB in every
process of a run, as long as importing torch itself.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_NAME = "torch._dynamo"


class _There(Loader):
    """Have importlib take an existing module as it is."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


@contextlib.contextmanager
def no_compiler() -> Iterator[None]:
    """Make and step optimizers inside this context without importing the compiler. Afterwards all is as before.

    If the compiler is imported already, nothing is done. If code asks for more of it, such as a module in it, it is imported
    after all.
    """
    if _NAME in sys.modules:
        yield
        return
    told: list[Any] = []

    def disable(function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        told.append(function)
        return function

    def import_it(name: str) -> Any:
        if name.startswith("__"):  # code that looks through all modules asks for these
            raise AttributeError(name)
        if sys.modules.get(_NAME) is idle:
            del sys.modules[_NAME]
        return getattr(importlib.import_module(_NAME), name)

    class Finder(MetaPathFinder):
        def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
            if not fullname.startswith(f"{_NAME}.") or sys.modules.get(_NAME) is not idle:
                return None
            del sys.modules[_NAME]
            return ModuleSpec(fullname, _There(importlib.import_module(fullname)))

    idle, finder = ModuleType(_NAME), Finder()
    idle.__dict__.update(disable=disable, graph_break=lambda: None, __getattr__=import_it, __path__=[])
    sys.modules[_NAME] = idle
    sys.meta_path.insert(0, finder)
    torch._dynamo = idle
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        if sys.modules.get(_NAME) is idle:
            del sys.modules[_NAME]
            delattr(torch, "_dynamo")
        for function in told:
            vars(function).pop("__dynamo_disable", None)
