"""Parameters with an action that is deferred until something uses the parameter.

Such a parameter becomes an instance of a subclass. Before torch does anything with the parameter, it asks the subclass. The use
may be in a module's forward, in a penalty on all weights, or in a script's own lines.
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

#: By id: the deferred action of a parameter. It is not an attribute, because a saved model would contain it.
_touched: dict[int, Callable[[], None]] = {}
#: Undoes `_watch_transforms`. It is armed while any parameter is lazy.
_watched = contextlib.ExitStack()


#: The modules of torch's transforms, and the functions that each transform calls first.
_TRANSFORMS = (eager_transforms, vmap, _vmap_internals)
_BEGINNINGS = tuple(f"_{kind}_increment_nesting" for kind in ("grad", "jvp", "vmap", "func"))


def accessors(*names: str) -> set[Any]:
    """Return the functions by which torch gets and sets these attributes of a tensor."""
    return {getattr(getattr(torch.Tensor, name), access) for name in names for access in ("__get__", "__set__")}


#: Functions of torch that do not trigger a parameter's action.
_HARMLESS = accessors("grad", "requires_grad", "shape", "dtype", "device", "ndim", "is_leaf", "is_sparse", "_version") | {
    getattr(torch.Tensor, name) for name in ("numel", "size", "stride", "dim", "element_size", "is_contiguous")
}


class LazyParameter(nn.Parameter):
    """A parameter with a deferred action, which runs when the parameter is used."""

    def __new__(cls, data: Any = None, requires_grad: bool = True) -> Any:
        return nn.Parameter(data, requires_grad)  # copies are ordinary parameters with the values

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
    """Call `touched` when `parameter` is used. `touched` must `materialize` the parameter."""
    if not _touched:
        _watch_transforms()
    parameter.__class__ = LazyParameter
    _touched[id(parameter)] = touched


def materialize(parameter: torch.Tensor) -> None:
    """Make `parameter` an ordinary one, without a deferred action."""
    parameter.__class__ = nn.Parameter
    del _touched[id(parameter)]
    if not _touched:
        _watched.close()


def materialize_all() -> None:
    """Run the deferred actions of all parameters."""
    while _touched:
        next(iter(_touched.values()))()


def _watch_transforms() -> None:
    """Make each transform of torch.func run all deferred actions when it starts.

    A transform takes a tensor's values without asking the tensor's class.
    """

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
    """Yield all instances of `kind` in nested lists, tuples and dicts."""
    if isinstance(thing, kind):
        yield thing
    elif isinstance(thing, dict):
        yield from instances_in(list(thing.values()), kind)
    elif isinstance(thing, list | tuple):
        for item in thing:
            yield from instances_in(item, kind)
