"""Tensors as frames: raw bytes out of and into torch, without a copy. Imports torch; the coordinator does not need it."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from roundtable.common.protocol.model_spec import TensorSpec
from roundtable.common.protocol.transport import bytes_of
from roundtable.common.runtime.errors import WireError

#: Bytes to whose multiples torch aligns what it allocates. Elsewhere some matrix products come out with other bits.
ALIGNED = 64


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype called `name`, such as 'float32'."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise WireError(f"there is no dtype '{name}'")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """'float32' for torch.float32."""
    return str(dtype).removeprefix("torch.")


def stored_as(spec: TensorSpec) -> tuple[torch.dtype, list[int]]:
    """dtype and shape that a tensor has in files. Of a complex dtype that safetensors has no name for, pairs of reals are stored,
    in one more dimension."""
    pairs = {"complex128": torch.float64, "complex32": torch.float16}
    return (pairs[spec.dtype], [*spec.shape, 2]) if spec.dtype in pairs else (dtype_of(spec.dtype), spec.shape)


def to_frame(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor. They stay shared: do not write to it until the frame is sent."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def from_frame(frame: Any, dtype: str, numel: int, what: str) -> torch.Tensor:
    """A flat tensor of `numel` elements over the frame's own bytes; read-only by agreement.

    Raises WireError naming `what` unless the frame has exactly the bytes needed.
    """
    buffer = bytes_of(frame)
    torch_dtype = dtype_of(dtype)
    if len(buffer) != numel * torch_dtype.itemsize:
        raise WireError(f"{what} has {len(buffer)} bytes where {numel * torch_dtype.itemsize} belong")
    if numel == 0:
        return torch.empty(0, dtype=torch_dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the buffer is read-only, and so is our use of it
        return torch.frombuffer(buffer, dtype=torch_dtype)
