"""Tensors as frames: raw bytes out of torch and into it, without a copy. Imports torch; the coordinator does not need it."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from roundtable.common.protocol.model_spec import TensorSpec
from roundtable.common.protocol.transport import bytes_of
from roundtable.common.runtime.errors import WireError

#: torch aligns its memory to multiples of so many bytes. With another alignment, some matrix products have other bits.
ALIGNED = 64


def dtype_of(name: str) -> torch.dtype:
    """Return the torch dtype called `name`, such as 'float32'. Raises WireError if there is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise WireError(f"there is no dtype '{name}'")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as 'float32' for torch.float32."""
    return str(dtype).removeprefix("torch.")


def stored_as(spec: TensorSpec) -> tuple[torch.dtype, list[int]]:
    """Return the dtype and shape of a tensor in files.

    safetensors has no name for some complex dtypes. Their values are stored as pairs of reals, in one more dimension.
    """
    pairs = {"complex128": torch.float64, "complex32": torch.float16}
    return (pairs[spec.dtype], [*spec.shape, 2]) if spec.dtype in pairs else (dtype_of(spec.dtype), spec.shape)


def to_frame(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor. The memory is shared: do not write to it until the frame is sent."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def from_frame(frame: Any, dtype: str, numel: int, what: str) -> torch.Tensor:
    """Return a flat tensor of `numel` elements over the frame's own bytes. Do not write to it.

    Raises WireError with `what` if the frame has another number of bytes.
    """
    buffer = bytes_of(frame)
    torch_dtype = dtype_of(dtype)
    if len(buffer) != numel * torch_dtype.itemsize:
        raise WireError(f"{what} has {len(buffer)} bytes, but must have {numel * torch_dtype.itemsize}")
    if numel == 0:
        return torch.empty(0, dtype=torch_dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the buffer is read-only, and nothing here writes to it
        return torch.frombuffer(buffer, dtype=torch_dtype)
