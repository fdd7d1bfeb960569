"""Parameters whose values are on the servers alone. The model has an empty parameter of device "meta" in their place.

Its own layer can use such a parameter. Any other operation that needs the values raises an error with the parameter's name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.replica.lazy_parameter import accessors, instances_in

#: Functions of torch whose result no longer depends on the parameter, or that need no values.
_PLAIN: set[Any] = {
    torch.Tensor.detach, torch.Tensor.clone, torch.Tensor.to, torch.Tensor.copy_, torch.Tensor.requires_grad_,
    torch.Tensor.__deepcopy__, torch.Tensor.__reduce_ex__,
} | accessors("data")  # fmt: skip
#: By id: the names of parameters. They are not attributes, because a saved model would contain them.
_names: dict[int, str] = {}


def absent(like: torch.Tensor, name: str, requires_grad: bool = True) -> nn.Parameter:
    """Return an empty parameter of the shape and dtype of `like`. The servers have its values under `name`."""
    parameter = nn.Parameter(torch.empty_like(like, device="meta"), requires_grad)
    parameter.__class__ = _Absent
    _names[id(parameter)] = name
    return parameter


class _Absent(nn.Parameter):
    def __new__(cls, data: Any = None, requires_grad: bool = True) -> Any:
        return nn.Parameter(data, requires_grad)  # a copy of one

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Part(torch.Tensor):
    """A tensor that torch has derived from an absent parameter, such as its transpose."""

    called: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    """Call a function of torch. Raises UsageError if it needs the values."""
    with torch._C.DisableTorchFunctionSubclass():
        tensors = list(instances_in((args, kwargs), torch.Tensor))
        first = next(tensor for tensor in tensors if isinstance(tensor, _Absent | _Part))
        name = first.called if isinstance(first, _Part) else _names.get(id(first), "a parameter")
        error = UsageError(
            f"the values of '{name}' are on the servers, so they cannot be used here: call its layer instead, or, for an "
            "embedding, leave out sparse=True."
        )
        if func not in _PLAIN and not all(tensor.is_meta for tensor in tensors):
            raise error
        try:
            found = func(*args, **kwargs)
        except NotImplementedError:  # torch raises this if a function reads a tensor without values
            raise error from None
        if func in _PLAIN or type(found) is not torch.Tensor or not found.is_meta:
            return found
        part = found.as_subclass(_Part)
        part.called = name
        return part
