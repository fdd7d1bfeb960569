"""The numbers a server holds: master copies of its chunks, and torch.optim's own optimizers stepping on them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from common.errors import WireError
from common.layout import Chunk, Layout
from common.messages import Update
from common.policies import Policy
from common.sums import Sum, adder
from common.tensors import dtype_of, from_frame, to_frame

Norm = tuple[int, int, float]


class _Part:
    """One chunk: master values (flat, `sum_dtype`) and the optimizer over its pieces."""

    def __init__(self, chunk: Chunk, update: Update) -> None:
        self.chunk = chunk
        self.master = torch.zeros(chunk.numel, dtype=dtype_of(chunk.sum_dtype))
        self.pieces = [self.master[p.offset : p.offset + p.length] for p in chunk.pieces]
        self.optimizer: torch.optim.Optimizer | None = None
        if chunk.kind == "param" and update.optimizer is not None:
            optimizer_class = getattr(torch.optim, update.optimizer)
            settings = _tuples(update.groups[chunk.group])
            # what the constructor takes is given to it, for some classes (Adagrad) make their first state there
            known = inspect.signature(optimizer_class).parameters
            self.optimizer = optimizer_class([{"params": self.pieces, **settings}], **_only(settings, known))


class Store:
    """The chunks of one server. Knows arithmetic only: when to do what is the shard's business."""

    def __init__(self, layout: Layout, server: int, update: Update, policy: Policy) -> None:
        self._parts = {chunk.id: _Part(chunk, update) for chunk in layout.on(server)}
        self._clip_norm = update.clip_norm
        double = any(spec.dtype == "float64" for spec in layout.tensors if spec.group >= 0)
        self._norm_dtype = torch.float64 if double else torch.float32
        self._policy = policy

    def receive(self, chunk: int, frame: Any, present: int) -> Sum:
        """A contribution out of a frame. Raises WireError if it has not the chunk's size or names pieces it lacks."""
        part = self._parts[chunk].chunk
        if not 0 <= present < 1 << len(part.pieces):
            raise WireError(f"chunk {chunk} has {len(part.pieces)} pieces, not those of mask {present:#x}")
        return Sum(from_frame(frame, part.sum_dtype, part.numel, f"chunk {chunk}"), present)

    def adder(self, chunk: int) -> Callable[[Sum, Sum], Sum]:
        """The function that adds two sums of `chunk`, left first."""
        return adder(self._parts[chunk].chunk.kind)

    def load(self, chunk: int, frame: Any) -> None:
        """Start from the weights in `frame`, which have the chunk's own dtype."""
        part = self._parts[chunk]
        part.master.copy_(from_frame(frame, part.chunk.dtype, part.chunk.numel, f"chunk {chunk}"))

    def publish(self, chunk: int) -> memoryview:
        """The weights now, in the chunk's own dtype, as bytes that no later update touches."""
        part = self._parts[chunk]
        return to_frame(part.master.to(dtype_of(part.chunk.dtype), copy=True))

    def mean(self, chunk: int, total: Sum, samples: int) -> Sum:
        """The sample-weighted mean whose sum is `total` (which is used up)."""
        if self._parts[chunk].chunk.kind == "max":
            return total
        out = total.values if total.owned else torch.empty_like(total.values)
        return Sum(torch.div(total.values, samples, out=out), total.present, owned=True)

    def norms(self, chunk: int, mean: Sum) -> list[Norm]:
        """2-norm of the gradient of each piece that has one."""
        part = self._parts[chunk].chunk
        if part.kind != "param":
            return []
        return [
            (piece.tensor, piece.start, float(torch.linalg.vector_norm(mean.values[piece.offset : piece.offset + piece.length])))
            for bit, piece in enumerate(part.pieces)
            if mean.present >> bit & 1
        ]

    def clip_factor(self, norms: Sequence[Norm]) -> torch.Tensor | None:
        """What to multiply gradients by, given the norms of all pieces on all servers in order; None for nothing.

        The arithmetic is that of `torch.nn.utils.clip_grad_norm_`, so the bits are too (a tensor cut into chunks: to rounding).
        """
        if self._clip_norm is None or not norms:
            return None
        total = torch.linalg.vector_norm(torch.tensor([norm for _, _, norm in norms], dtype=self._norm_dtype))
        return torch.clamp(self._clip_norm / (total + 1e-6), max=1.0)

    def apply(
        self,
        chunk: int,
        mean: Sum,
        hypers: Mapping[str, Any],
        factor: torch.Tensor | None = None,
        lr_scale: float = 1.0,
        base: Any = None,
    ) -> None:
        """Make new weights from the mean contribution.

        `hypers` overrides settings of the parameter group; `factor` is the clipping; `lr_scale` multiplies the learning rate;
        `base` holds the weights (a frame of `publish`) that the contribution was computed from, for policies that correct for
        what has happened since.
        """
        part = self._parts[chunk]
        if part.optimizer is None:
            for bit, (piece, view) in enumerate(zip(part.chunk.pieces, part.pieces, strict=True)):
                if mean.present >> bit & 1:
                    view.copy_(mean.values[piece.offset : piece.offset + piece.length])
            return
        gradient = mean.values
        if factor is not None:
            gradient.mul_(factor)
        if base is not None:
            then = from_frame(base, part.chunk.dtype, part.chunk.numel, f"chunk {chunk}").to(part.master.dtype)
            gradient = self._policy.compensate(gradient, part.master, then)
        for bit, (piece, view) in enumerate(zip(part.chunk.pieces, part.pieces, strict=True)):
            view.grad = gradient[piece.offset : piece.offset + piece.length] if mean.present >> bit & 1 else None
        group = part.optimizer.param_groups[0]
        group.update(_tuples(hypers))
        rate = group["lr"]
        group["lr"] = rate * lr_scale
        part.optimizer.step()
        group["lr"] = rate
        for view in part.pieces:
            view.grad = None


def _only(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key in names}


def _tuples(hypers: Mapping[str, Any]) -> dict[str, Any]:
    """MessagePack has no tuples; torch.optim expects them (betas)."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in hypers.items()}
