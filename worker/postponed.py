"""Gradients of linear layers that are added to another gradient as they are computed.

dW = dy^T x is one matrix product, and so is dW' + dy^T x, which spares writing dW, reading it again, and memory for it. Whether
anybody wants to see dW by itself is known only when it is to be contributed: so it is put off until then, or until a script looks
at the weight's `grad`. Autograd is given a `Product` in its place. If autograd adds anything to that, it has dW to add to, in its
own order: so a weight may be used any number of times.

The sum has the bits of adding dW where the library adds up an element's products before it adds them to what is there, as it does
for few samples. That is tried out on the first gradient of each shape, and what comes out differently is added as usual.
"""

from __future__ import annotations

import functools
import mmap
from collections import Counter
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from common.nonfinite import is_finite
from common.tensors import ALIGNED
from worker.touch import Untouched, accessors, put_off, settle

#: A weight has to have this many times the elements of dy and x, for those are copied: scripts may write to them meanwhile.
_LARGER = 16
#: Shapes that are tried, at most, and how often each if gradients tell nothing: of so many elements one at least must not be 0.
_SHAPES, _TRIES, _TELLING = 64, 3, 16


class Later(Untouched):
    """A parameter whose gradient is still to be computed."""

    harmless = accessors("requires_grad", "shape", "dtype", "device", "ndim", "is_leaf")


class Product(torch.Tensor):
    """dy^T x, for dy (samples x outputs) and x (samples x inputs). Torch computes it when it does more than hand it on."""

    dy: torch.Tensor
    x: torch.Tensor

    def __new__(cls, dy: torch.Tensor, x: torch.Tensor) -> Product:
        shape = dy.shape[1], x.shape[1]
        product: Product = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dy.dtype, device=dy.device)
        product.dy, product.x = dy, x
        return product

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return cls(args[0].dy, args[0].x)
        args, kwargs = tree_map_only(cls, cls.made, (args, kwargs or {}))
        return func(*args, **kwargs)

    def made(self) -> torch.Tensor:
        """The product itself."""
        return self.dy.t().mm(self.x)


class Postponed:
    """The gradients that are put off: at most one of each weight."""

    def __init__(self) -> None:
        #: By id: the weight and its gradient.
        self._products: dict[int, tuple[torch.Tensor, Product]] = {}
        #: By what decides on how a product is computed: whether it has the right bits when it is added.
        self._fits: dict[object, bool] = {}
        self._tried: Counter[object] = Counter()

    def __contains__(self, weight: torch.Tensor) -> bool:
        return id(weight) in self._products

    def postpone(self, weight: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> Product | None:
        """What to give autograd for dy^T x, to put off computing it. None: it is to be computed now."""
        if weight in self:  # a second backward: torch adds its gradient to that of the first
            self.make(weight)
            return None
        if weight.grad is not None or _is_hooked(weight) or _LARGER * (dy.numel() + x.numel()) > weight.numel():
            return None
        if not (_is_as_copied(dy) and _is_as_copied(x)) or not self._fits.get(_shape(dy, x), len(self._fits) < _SHAPES):
            return None
        return Product(dy.clone(), x.clone())

    def caught(self, weight: torch.Tensor) -> None:
        """Backward is done with the weight: what it has given it is put off if it is a product and nothing else."""
        with torch._C.DisableTorchFunctionSubclass():
            gradient = weight.grad
            if type(gradient) is Product:
                weight.grad = None
                self._products[id(weight)] = weight, gradient
                put_off(weight, Later, functools.partial(self.make, weight))
            elif gradient is not None and weight in self:
                self.make(weight)

    @torch.no_grad()
    def make(self, weight: torch.Tensor) -> None:
        """Compute what was put off, for somebody looks."""
        made = self._take(weight).made()
        weight.grad = made if weight.grad is None else made.add_(weight.grad)

    @torch.no_grad()
    def add_to(self, weight: torch.Tensor, total: torch.Tensor) -> None:
        """total += dy^T x, to the bit."""
        product = self._take(weight)
        dy, x = product.dy, product.x
        shape = _shape(dy, x)
        if self._fits.get(shape):
            total.addmm_(dy.t(), x)
            return
        with mmap.mmap(-1, total.nbytes) as memory:  # given back afterwards, unlike what torch allocates
            right = torch.mm(dy.t(), x, out=torch.frombuffer(memory, dtype=total.dtype).view(total.shape))
            tells = _TELLING * int(right.count_nonzero()) > right.numel() and is_finite(right)
            right.add_(total)
            total.addmm_(dy.t(), x)
            fits = torch.equal(total.view(torch.uint8), right.view(torch.uint8))
            self._tried[shape] += 1
            if tells or not fits or self._tried[shape] == _TRIES:
                self._fits[shape] = tells and fits
            if not fits:
                total.copy_(right)
            del right  # or the memory could not be given back

    def forget(self) -> None:
        """Nobody needs what was put off."""
        for weight, _ in self._products.values():
            settle(weight)
        self._products.clear()

    def _take(self, weight: torch.Tensor) -> Product:
        settle(weight)
        return self._products.pop(id(weight))[1]


def _shape(dy: torch.Tensor, x: torch.Tensor) -> object:
    return dy.dtype, dy.shape, x.shape


def _is_as_copied(tensor: torch.Tensor) -> bool:
    """Whether it lies in memory as a copy of it does, so that its products have the same bits."""
    return tensor.is_contiguous() and tensor.data_ptr() % ALIGNED == 0


def _is_hooked(weight: torch.Tensor) -> bool:
    """Whether somebody but the replica wants to be called with the gradient."""
    return bool(weight._backward_hooks) or len(weight._post_accumulate_grad_hooks or ()) > 1
