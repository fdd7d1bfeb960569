"""Parameters of which something is put off until somebody touches them.

Such a parameter is made an instance of a subclass for the time being, which torch asks before it does anything with it, wherever
that is: in a module's forward, in a penalty on all weights, in a script's own lines.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import _vmap_internals, nn
from torch._functorch import eager_transforms, vmap

T = TypeVar("T")

#: By id, what to do when a parameter is touched. Not in the parameter, for what that has is saved along with a model.
_touched: dict[int, Callable[[], None]] = {}
#: Undoes what `_watch_transforms` has done, while any parameter is here.
_watched = contextlib.ExitStack()


#: Where torch has its transforms, and the functions that each of them calls first.
_TRANSFORMS = (eager_transforms, vmap, _vmap_internals)
_BEGINNINGS = tuple(f"_{kind}_increment_nesting" for kind in ("grad", "jvp", "vmap", "func"))


def accessors(*names: str) -> set[Any]:
    """The functions, as torch names them, that get and set these attributes of a tensor."""
    return {getattr(getattr(torch.Tensor, name), access) for name in names for access in ("__get__", "__set__")}


#: What may be done to a parameter all the same.
_HARMLESS = accessors("grad", "requires_grad", "shape", "dtype", "device", "ndim", "is_leaf", "is_sparse", "_version") | {
    getattr(torch.Tensor, name) for name in ("numel", "size", "stride", "dim", "element_size", "is_contiguous")
}


class LazyParameter(nn.Parameter):
    """A parameter with something put off; touching it does that first."""

    def __new__(cls, data: Any = None, requires_grad: bool = True) -> Any:
        return nn.Parameter(data, requires_grad)  # a copy of one, which has what it copied

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        for parameter in instances_in((args, kwargs), LazyParameter):
            _touched[id(parameter)]()
        return func(*args, **kwargs)


def put_off(parameter: torch.Tensor, touched: Callable[[], None]) -> None:
    """Have `touched` called when `parameter` is touched. It must `materialize` it."""
    if not _touched:
        _watch_transforms()
    parameter.__class__ = LazyParameter
    _touched[id(parameter)] = touched


def materialize(parameter: torch.Tensor) -> None:
    """Nothing of `parameter` is put off any more."""
    parameter.__class__ = nn.Parameter
    del _touched[id(parameter)]
    if not _touched:
        _watched.close()


def materialize_all() -> None:
    """Touch all parameters of which something is put off."""
    while _touched:
        next(iter(_touched.values()))()


def _watch_transforms() -> None:
    """Have each transform of torch.func touch all parameters as it begins. A transform takes what is in a tensor, and does not
    ask the tensor's class."""

    def first(begin: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(begin)
        def begins(*arguments: Any) -> Any:
            materialize_all()
            return begin(*arguments)

        return begins

    for module in _TRANSFORMS:
        for name in _BEGINNINGS:
            if (begin := vars(module).get(name)) is not None:
                setattr(module, name, first(begin))
                _watched.callback(setattr, module, name, begin)


def instances_in(thing: Any, kind: type[T]) -> Iterator[T]:
    """All of a kind that are in nested lists, tuples and dicts."""
    if isinstance(thing, kind):
        yield thing
    elif isinstance(thing, dict):
        yield from instances_in(list(thing.values()), kind)
    elif isinstance(thing, list | tuple):
        for item in thing:
            yield from instances_in(item, kind)
