"""Parameters whose values are on the servers and never here: in the model stands an empty one of device "meta".

Its own layer knows how to use it. Anything else that would need its values is an error, which names it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.replica.lazy_parameter import accessors, instances_in

#: What gives a tensor that has nothing to do with the parameter any more, or needs no values.
_PLAIN: set[Any] = {
    torch.Tensor.detach, torch.Tensor.clone, torch.Tensor.to, torch.Tensor.copy_, torch.Tensor.requires_grad_,
    torch.Tensor.__deepcopy__, torch.Tensor.__reduce_ex__,
} | accessors("data")  # fmt: skip
#: By id, what parameters are called. Not in the parameter, for what that has is saved along with a model.
_names: dict[int, str] = {}


def absent(like: torch.Tensor, name: str, requires_grad: bool = True) -> nn.Parameter:
    """An empty parameter of the shape and dtype of `like`, whose values are on the servers under `name`."""
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
    """What torch has made of an absent parameter, such as its transpose."""

    called: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    """Call a function of torch, unless it needs values that are not here."""
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
        except NotImplementedError:  # what torch raises for reading one
            raise error from None
        if func in _PLAIN or type(found) is not torch.Tensor or not found.is_meta:
            return found
        part = found.as_subclass(_Part)
        part.called = name
        return part
