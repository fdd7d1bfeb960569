"""A device that only says so: its tensors have numbers, which are on the CPU, but no operation takes some from here and some from
there, as on a GPU. Within `Elsewhere()` it is torch's device "meta"."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
#: What moves between devices.
_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class There(torch.Tensor):
    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> There:
        made: There = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    def __init__(self, inner: torch.Tensor) -> None:
        super().__init__()

    @property
    def data(self) -> There:  # type: ignore[override]
        return self

    @data.setter
    def data(self, other: There) -> None:
        assert self.shape == other.shape
        self.inner = other.inner

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, There)}
    here = [tensor for tensor in tensors if not isinstance(tensor, There) and tensor.dim()]
    assert not (there and here) or func in _MOVES, f"{func} has operands here and there"
    asked = kwargs.get("device")
    goes_there = asked == DEVICE or (bool(there) and asked is None and func is not torch.ops.aten._local_scalar_dense.default)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}

    def inside(leaf: Any) -> Any:
        return leaf.inner if isinstance(leaf, There) else leaf

    def outside(leaf: Any) -> Any:
        return (there[id(leaf)] if id(leaf) in there else There(leaf)) if isinstance(leaf, torch.Tensor) else leaf

    if func is torch.ops.aten.copy_.default:
        args[0].inner.copy_(inside(args[1])) if isinstance(args[0], There) else func(args[0], inside(args[1]))
        return args[0]
    out = func(*tree_map(inside, args), **tree_map(inside, kwargs))
    return tree_map(outside, out) if goes_there else out
