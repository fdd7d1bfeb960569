"""Parameters of which something is put off until somebody touches them.

Such a parameter is made an instance of a subclass for the time being, which torch asks before it does anything with it, wherever
that is: in a module's forward, in a penalty on all weights, in a script's own lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

T = TypeVar("T")

#: By id, what to do when a parameter is touched. Not in the parameter, for what that has is saved along with a model.
_touched: dict[int, Callable[[], None]] = {}


class Untouched(nn.Parameter):
    """A parameter with something put off; touching it does that first."""

    #: What may be done to it all the same.
    harmless: ClassVar[set[Any]] = set()

    def __new__(cls, data: Any = None, requires_grad: bool = True) -> Any:
        return nn.Parameter(data, requires_grad)  # a copy of one, which has what it copied

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in cls.harmless:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        for parameter in instances_in((args, kwargs), Untouched):
            _touched[id(parameter)]()
        return func(*args, **kwargs)


def accessors(*names: str) -> set[Any]:
    """The functions, as torch names them, that get and set these attributes of a tensor."""
    return {getattr(getattr(torch.Tensor, name), access) for name in names for access in ("__get__", "__set__")}


def put_off(parameter: torch.Tensor, kind: type[Untouched], touched: Callable[[], None]) -> None:
    """Make `parameter` a `kind`. `touched` must `settle` it."""
    parameter.__class__ = kind
    _touched[id(parameter)] = touched


def settle(parameter: torch.Tensor) -> None:
    """Nothing of `parameter` is put off any more."""
    parameter.__class__ = nn.Parameter
    del _touched[id(parameter)]


def instances_in(thing: Any, kind: type[T]) -> Iterator[T]:
    """All of a kind that are in nested lists, tuples and dicts."""
    if isinstance(thing, kind):
        yield thing
    elif isinstance(thing, dict):
        yield from instances_in(list(thing.values()), kind)
    elif isinstance(thing, list | tuple):
        for item in thing:
            yield from instances_in(item, kind)
