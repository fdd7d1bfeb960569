"""Handing in the trained model: one safetensors file's bytes, in parts that fit into messages.

The parts are made one after another, so that no process ever has the file in memory beside the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping

import torch
from safetensors.torch import save
from torch import nn

from common.layout import CHUNK_BYTES
from common.messages import ModelPart
from common.tensors import to_frame


def model_parts(model: nn.Module) -> Iterator[tuple[ModelPart, list[bytearray]]]:
    """The state of `model`, by the names of its state_dict, as messages and their frame of up to a chunk's bytes.

    Tied weights are stored once for each of their names.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    digest = weights_sha256(model)
    header = _header(state, {"format": "pt", "weights_sha256": digest})
    parts = -(-(len(header) + sum(tensor.nbytes for tensor in state.values())) // CHUNK_BYTES)
    for part, data in enumerate(_cut(_contents(header, state))):
        yield ModelPart(part, parts, digest), [data]


def _header(state: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file whose tensors follow in the order of `state`."""
    fields: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, tensor in state.items():
        start, end = end, end + tensor.nbytes
        fields[name] = {"dtype": _dtype(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _dtype(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype, as it says itself."""
    empty = save({"": torch.empty(0, dtype=dtype)})
    name: str = json.loads(empty[8 : 8 + int.from_bytes(empty[:8], "little")])[""]["dtype"]
    return name


def _contents(header: bytes, state: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    yield memoryview(header)
    for tensor in state.values():
        yield to_frame(tensor.cpu().contiguous())


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


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over the bytes of all parameters in the order of their names, as hexadecimal digits."""
    digest = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        digest.update(to_frame(parameter.detach().cpu().contiguous()))
    return digest.hexdigest()
