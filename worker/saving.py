"""Handing in the trained model: one safetensors file's bytes, in parts that fit into messages.

The parts are made one after another, so that no process ever has the file in memory beside the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from common.layout import CHUNK_BYTES
from common.messages import ModelPart
from common.tensorfile import header
from common.tensors import to_frame
from worker.buffers import stored_parts

#: Given a tensor of the model: its bytes in order where they are elsewhere, else None.
Read = Callable[[torch.Tensor], Iterator[memoryview] | None]


def nothing(tensor: torch.Tensor) -> None:
    """All tensors are in the model itself."""


def model_parts(model: nn.Module, read: Read = nothing) -> Iterator[tuple[ModelPart, list[bytearray]]]:
    """The state of `model`, by the names of its state_dict, as messages and their frame of up to a chunk's bytes.

    Tied weights are stored once for each of their names, and sparse buffers by their parts. Parameters come first, in the order
    of their names: their SHA-256 is made on the way, so it is in the part that is sent last, which is the file's first.
    """
    state = {f"{name}{end}": part for name, t in model.state_dict(keep_vars=True).items() for end, part in stored_parts(t)}
    trained = dict(sorted(model.named_parameters()))
    state = {name: state[name] for name in [*(n for n in trained if n in state), *(n for n in state if n not in trained)]}
    digest = hashlib.sha256()
    kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()}
    head = header(kinds, {"format": "pt", "weights_sha256": digest.hexdigest()})
    count = -(-(len(head) + sum(tensor.nbytes for tensor in state.values())) // CHUNK_BYTES)

    def contents() -> Iterator[memoryview]:
        yield memoryview(head)
        for name, tensor in {**trained, **state}.items():
            for data in read(tensor) or [to_frame(tensor.detach().cpu().contiguous())]:
                if name in trained:
                    digest.update(data)
                if name in state:
                    yield data

    parts = _cut(contents())
    first = next(parts)
    for part, data in enumerate(parts, 1):
        yield ModelPart(part, count), [data]
    head = header(kinds, {"format": "pt", "weights_sha256": digest.hexdigest()})
    first[: len(head)] = head[: len(first)]
    yield ModelPart(0, count, digest.hexdigest()), [first]


def _cut(contents: Iterator[memoryview]) -> Iterator[bytearray]:
    """The same bytes in pieces of CHUNK_BYTES, the last one shorter."""
    part = bytearray()
    for data in contents:
        while data:
            taken = data[: CHUNK_BYTES - len(part)]
            part += taken
            data = data[len(taken) :]
            if len(part) == CHUNK_BYTES:
                yield part
                part = bytearray()
    if part:
        yield part
