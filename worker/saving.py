"""Handing in the trained model: one safetensors file's bytes, in parts that fit into messages."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from safetensors.torch import save
from torch import nn

from common.layout import CHUNK_BYTES
from common.messages import ModelPart
from common.tensors import to_frame


def model_parts(model: nn.Module) -> Iterator[tuple[ModelPart, list[memoryview]]]:
    """The state of `model`, by the names of its state_dict, as messages and their frame of up to a chunk's bytes."""
    state: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        shared = tensor.data_ptr() in seen  # tied weights are stored once for each of their names
        seen.add(tensor.data_ptr())
        state[name] = tensor.clone() if shared else tensor
    digest = weights_sha256(model)
    data = memoryview(save(state, {"format": "pt", "weights_sha256": digest}))
    parts = -(-len(data) // CHUNK_BYTES)
    for part in range(parts):
        yield ModelPart(part, parts, digest), [data[part * CHUNK_BYTES : (part + 1) * CHUNK_BYTES]]


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over the bytes of all parameters in the order of their names, as hexadecimal digits."""
    digest = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        digest.update(to_frame(parameter.detach().cpu().contiguous()))
    return digest.hexdigest()
