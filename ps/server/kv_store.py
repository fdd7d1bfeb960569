"""The key-value store of a server: named tensors that workers push to and pull from, outside of any model.

A key is on one server, so its pushes have one order. A pull sees some number of the first pushes in full, and nothing of later
ones. Values travel in blocks. A push is applied when all its blocks have arrived. A pull is answered with all blocks of one
version. A push counts once, however often it is sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch

from roundtable.common.model.layout import CHUNK_BYTES
from roundtable.common.model.tensor_bytes import dtype_name, dtype_of, from_frame, to_frame
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.kv import KvPull, KvPush, KvReply
from roundtable.common.protocol.messages.session import Refused
from roundtable.common.protocol.transport import Frames, bytes_of
from roundtable.common.runtime.errors import WireError

#: The store remembers this many of a client's latest pushed blocks. A client has far fewer outstanding.
_REMEMBERED = 4096
#: Upper bounds in bytes: of a block besides its elements, of a value besides its blocks, and of one letter of its key.
_BLOCK_BYTES, _VALUE_BYTES, _LETTER_BYTES = 500, 1000, 4
#: The dtypes of values.
_DTYPES = (
    "float32", "float64", "bfloat16", "float16", "complex64", "complex128", "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip


@dataclass
class _Value:
    """One key's value, in blocks."""

    blocks: list[torch.Tensor]
    numel: int
    #: The number of pushes applied.
    version: int = 0
    #: True if frames under way lie in the blocks, which must not be written to then.
    lent: bool = False

    @property
    def dtype(self) -> str:
        return dtype_name(self.blocks[0].dtype)

    def add(self, blocks: list[torch.Tensor]) -> None:
        if self.lent:
            self.blocks, self.lent = [torch.add(a, b) for a, b in zip(self.blocks, blocks, strict=True)], False
        else:
            for block, more in zip(self.blocks, blocks, strict=True):
                block.add_(more)


@dataclass
class _Client:
    """The pushes of one client."""

    #: By a block's message id: the version in its answer.
    answered: dict[int, int] = field(default_factory=dict)
    #: Message ids in the order in which to forget them.
    order: deque[int] = field(default_factory=deque)
    #: By incomplete push and block number: the blocks so far, in the memory of their frames.
    incoming: dict[int, dict[int, torch.Tensor]] = field(default_factory=dict)
    #: By push that did not fit: why it was refused.
    failed: dict[int, str] = field(default_factory=dict)


class KvStore:
    """Values by key, in at most `mib` MiB of memory."""

    def __init__(self, mib: int) -> None:
        self._mib = mib
        #: Bytes of all values and incoming blocks.
        self._bytes = 0
        self._values: dict[str, _Value] = {}
        self._clients: dict[tuple[str, int], _Client] = {}

    def handle(self, sender: str, incarnation: int, body: KvPush | KvPull, frames: Frames) -> list[tuple[Body, list[Any]]]:
        """Take a push or a pull. Return the replies and their frames. Raises WireError if a push does not fit."""
        if isinstance(body, KvPull):
            return self._pull(body)
        client = self._clients.get((sender, incarnation), _Client())
        if body.id not in client.answered:
            block = self._check(sender, body, frames)
            self._clients[sender, incarnation] = client
            client.answered[body.id] = self._take(sender, client, body, block)
            client.order.append(body.id)
            if len(client.order) > _REMEMBERED:
                del client.answered[client.order.popleft()]
        return [(KvReply(body.id, client.answered[body.id]), [])]

    def forget(self, worker: str) -> None:
        """Forget a lost worker. Its incomplete pushes do not count."""
        for key in [key for key in self._clients if key[0] == worker]:
            client = self._clients.pop(key)
            self._bytes -= sum(_bytes_of(blocks.values()) for blocks in client.incoming.values())

    def _pull(self, pull: KvPull) -> list[tuple[Body, list[Any]]]:
        value = self._values.get(pull.key)
        if value is None:
            return [(Refused(f"KvPull:{pull.id}", f"nothing was pushed to key '{pull.key}' yet."), [])]
        if value.numel != pull.numel:
            reason = f"key '{pull.key}' holds {value.numel} elements, but was pulled into {pull.numel}."
            return [(Refused(f"KvPull:{pull.id}", reason), [])]
        value.lent = True
        return [
            (KvReply(pull.id, value.version, value.dtype, number), [to_frame(block)]) for number, block in enumerate(value.blocks)
        ]

    def _take(self, sender: str, client: _Client, push: KvPush, block: torch.Tensor) -> int:
        """Keep a block, and apply its push if that is complete. Return the key's version."""
        self._check_fits(sender, client, push)
        blocks = client.incoming.setdefault(push.push, {})
        if push.block not in blocks:
            blocks[push.block] = block
            self._bytes += _bytes_of([block])
        if len(blocks) == _count(push):
            self._let_go(client, push)
            self._apply(push, [blocks[number] for number in range(len(blocks))])
        value = self._values.get(push.key)
        return value.version if value is not None else 0

    def _let_go(self, client: _Client, push: KvPush) -> None:
        """Forget the blocks of a push."""
        self._bytes -= _bytes_of(client.incoming.pop(push.push, {}).values())

    def _check(self, sender: str, push: KvPush, frames: Frames) -> torch.Tensor:
        """Return the block in a push. Raises WireError if the block is malformed or the store is full."""
        if len(frames) != 1:
            raise WireError(f"a push of {sender} to '{push.key}' has {len(frames)} frames instead of one")
        if push.dtype not in _DTYPES:
            raise WireError(f"a push of {sender} to '{push.key}' has dtype {push.dtype}; servers can keep {', '.join(_DTYPES)}")
        buffer = bytes_of(frames[0])
        if self._bytes + buffer.nbytes + _BLOCK_BYTES + _VALUE_BYTES + _LETTER_BYTES * len(push.key) > self._mib << 20:
            raise WireError(
                f"a push of {sender} to '{push.key[:100]}' is more than a server keeps by key, {self._mib} MiB with what is on "
                "its way: start the run with more --kv-memory, or on more servers"
            )
        if push.block >= _count(push):
            raise WireError(f"a push of {sender} to '{push.key}' has a block {push.block}, which is beyond its end")
        length = min(_step(push), push.numel - push.block * _step(push))
        return from_frame(buffer, push.dtype, length, f"key '{push.key}'")

    def _check_fits(self, sender: str, client: _Client, push: KvPush) -> None:
        """Raise WireError if the push does not fit the key's value, or did not fit when another of its blocks came."""
        value = self._values.get(push.key)
        if push.op == "add" and value is not None and (value.numel, value.dtype) != (push.numel, push.dtype):
            what = f"key '{push.key}' holds {value.numel} x {value.dtype}; {sender} added {push.numel} x {push.dtype}"
            client.failed.setdefault(push.push, what)
        if push.push in client.failed:
            self._let_go(client, push)
            if len(client.failed) > _REMEMBERED:
                del client.failed[next(iter(client.failed))]
            raise WireError(client.failed[push.push])

    def _apply(self, push: KvPush, blocks: list[torch.Tensor]) -> None:
        value = self._values.get(push.key)
        if value is None or push.op == "set":
            new = _Value([block.clone() for block in blocks], push.numel, value.version if value else 0)
            self._bytes += _bytes_of(new.blocks)
            self._bytes += _VALUE_BYTES + _LETTER_BYTES * len(push.key) if value is None else -_bytes_of(value.blocks)
            value = self._values[push.key] = new
        else:
            value.add(blocks)
        value.version += 1


def _bytes_of(blocks: Collection[torch.Tensor]) -> int:
    return sum(_BLOCK_BYTES + block.nbytes for block in blocks)


def _step(push: KvPush) -> int:
    """Return the number of elements in each block but the last."""
    return CHUNK_BYTES // dtype_of(push.dtype).itemsize


def _count(push: KvPush) -> int:
    return max(1, -(-push.numel // _step(push)))
