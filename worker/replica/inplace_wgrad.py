"""Gradients of linear layers' weights, computed in the place from which they are contributed.

Without this, autograd allocates each gradient anew. For a large one, touching new memory takes longer than computing it. So the
backward of `torch.nn.Linear` gets a place to write to. The arithmetic, and so each bit, is autograd's own.
"""

from __future__ import annotations

import types
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import linear

#: Weights of fewer bytes are left to torch, because a call of ours takes longer than copying their gradient.
_LARGE_BYTES = 256 << 10


class GradientSink(Protocol):
    """The receiver of weights' gradients."""

    def place(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Return the tensor to write the gradient to, of the weight's shape. Return None to have it allocated."""


class _Linear(torch.autograd.Function):
    """y = x W^T + b, with dW = (dy)^T x written to its place if backward will accumulate it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, taker: GradientSink) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.taker = taker
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = gradients[0].reshape(-1, weight.shape[0])
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx = dy.mm(weight).view(x.shape) if needs_x else None
        dw = None
        if needs_weight:
            place = ctx.taker.place(weight) if _accumulates(ctx.next_functions[1][0]) else None
            dw = torch.mm(dy.t(), x.reshape(-1, weight.shape[1]), out=place)
        return dx, dw, dy.sum(0) if needs_bias else None, None


def _accumulates(node: Any) -> bool:
    """Return whether this backward adds to the `grad` of the leaf behind `node`, and is not itself differentiated."""
    if torch.is_grad_enabled() or _is_transformed():
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch.autograd.grad: the gradient is the caller's
        return False


def install(model: nn.Module, taker: GradientSink) -> None:
    """Make all large plain linear layers of `model` ask `taker` where to put their weights' gradients."""

    def forward(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if not _is_usual(module, x):
            return nn.Linear.forward(module, x)
        y: torch.Tensor = _Linear.apply(x, module.weight, module.bias, taker)  # type: ignore[no-untyped-call]
        return y

    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module) and module.weight.nbytes >= _LARGE_BYTES:
            # a copy of the model keeps this; a model read from a file has torch's own forward again
            module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


def _is_usual(module: nn.Linear, x: torch.Tensor) -> bool:
    """Return whether nothing is going on that only torch's own forward can handle."""
    return (
        torch.is_grad_enabled()
        and not _is_transformed()
        and type(x) is torch.Tensor
        and (x.dim() == 2 or (x.dim() == 3 and x.is_contiguous()))
        and type(module.weight) is nn.Parameter
        and module.weight.requires_grad
        and module.weight.numel() > 0
        and module.weight.is_contiguous()
        and x.dtype == module.weight.dtype
        and x.device.type == module.weight.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _is_transformed() -> bool:
    """Return whether torch must see each operation.

    It must for a transform of torch.func, for forward-mode differentiation, and while it records a trace.
    """
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )
