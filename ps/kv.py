"""The key-value side of a server: named tensors that workers push to and pull from, outside of any model.

Values are cut into blocks by the client; each block lives on one server. A push counts once, however often it is sent.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

from common.errors import WireError
from common.messages import Body, KvPull, KvPush, KvReply, Refused
from common.tensors import dtype_name, dtype_of, from_frame, to_frame
from common.wire import Frames, bytes_of

#: How many of a client's latest pushes are remembered. A client has far fewer outstanding.
_REMEMBERED = 4096
#: What may be added up.
_DTYPES = (
    "float32", "float64", "bfloat16", "float16", "complex64", "complex128", "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip


def _memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass
class _Block:
    values: torch.Tensor
    #: Elements of the whole key.
    numel: int
    version: int = 0


@dataclass
class _Client:
    """Ids of the pushes of one client that were applied, and the order in which to forget them."""

    applied: dict[int, int] = field(default_factory=dict)
    order: deque[int] = field(default_factory=deque)


class KvStore:
    """Blocks by (key, block number)."""

    def __init__(self) -> None:
        #: Of all blocks together.
        self._bytes = 0
        self._blocks: dict[tuple[str, int], _Block] = {}
        self._clients: dict[tuple[str, int], _Client] = {}

    def handle(self, sender: str, incarnation: int, body: KvPush | KvPull, frames: Frames) -> tuple[Body, list[Any]]:
        """The reply and its frames. Raises WireError for a push that does not fit the block."""
        if isinstance(body, KvPull):
            block = self._blocks.get((body.key, body.block))
            if block is None:
                return Refused(f"KvPull:{body.id}", f"nothing was pushed to key '{body.key}' yet."), []
            if block.numel != body.numel:
                reason = f"key '{body.key}' holds {block.numel} elements, but was pulled into {body.numel}."
                return Refused(f"KvPull:{body.id}", reason), []
            return KvReply(body.id, block.version, dtype_name(block.values.dtype)), [to_frame(block.values.clone())]
        client = self._clients.get((sender, incarnation), _Client())
        if body.id not in client.applied:
            client.applied[body.id] = self._apply(sender, body, frames)
            client.order.append(body.id)
            self._clients[sender, incarnation] = client
            if len(client.order) > _REMEMBERED:
                del client.applied[client.order.popleft()]
        return KvReply(body.id, client.applied[body.id]), []

    def forget(self, worker: str) -> None:
        """It sends nothing any more."""
        self._clients = {key: client for key, client in self._clients.items() if key[0] != worker}

    def _apply(self, sender: str, push: KvPush, frames: Frames) -> int:
        if len(frames) != 1:
            raise WireError(f"a push of {sender} to '{push.key}' has {len(frames)} frames instead of one")
        if push.dtype not in _DTYPES:
            raise WireError(f"a push of {sender} to '{push.key}' has dtype {push.dtype}; servers can keep {', '.join(_DTYPES)}")
        buffer = bytes_of(frames[0])
        if self._bytes + len(buffer) > _memory() and (push.key, push.block) not in self._blocks:
            raise WireError(f"a push of {sender} to '{push.key}' is more than there is memory for")
        values = from_frame(buffer, push.dtype, len(buffer) // dtype_of(push.dtype).itemsize, f"key '{push.key}'")
        block = self._blocks.get((push.key, push.block))
        if block is None or push.op == "set":
            self._bytes += len(buffer) - (block.values.nbytes if block is not None else 0)
            block = _Block(values.clone(), push.numel, block.version if block else 0)
            self._blocks[push.key, push.block] = block
        elif (block.numel, block.values.dtype, block.values.shape) != (push.numel, values.dtype, values.shape):
            raise WireError(
                f"key '{push.key}' holds {block.numel} x {dtype_name(block.values.dtype)}; "
                f"{sender} added {push.numel} x {push.dtype}"
            )
        else:
            block.values.add_(values)
        block.version += 1
        return block.version
