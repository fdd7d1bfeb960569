"""Moves the state of a shard from one server to another. The parts are those of a checkpoint, but never touch a disk.

A large tensor is sent as several parts, each with some of its rows. The receiver puts rows in their place as they come, so it
never holds them twice.

State machines without a socket or a clock. Invariants: at most CREDIT_BYTES, or one part, are under way; a part that is not
acknowledged is sent again; a state is used only when all its parts have arrived.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from roundtable.common.model.sparse_rows import cut, join
from roundtable.common.model.tensor_bytes import dtype_name
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.replication import StateHeader, StatePart, StatePartAck
from roundtable.common.protocol.transport import SEND_AGAIN_S, Frames
from roundtable.common.runtime.errors import WireError
from roundtable.common.storage.tensor_file import TensorFiles
from roundtable.ps.params.state_part import Part

#: At most this many bytes of state are under way to a server.
CREDIT_BYTES = 8 << 20
#: A tensor of a state has at most this many dimensions and elements.
_MOST_DIMENSIONS, _MOST_ELEMENTS = 64, 1 << 40


class Outgoing:
    """The sender's side: sends `head`, then `parts`, whose tensors must not change meanwhile."""

    def __init__(self, head: StateHeader, parts: Sequence[Part]) -> None:
        self.head = head
        self._parts: dict[int, tuple[StatePart, Frames]] = {}
        for number, part in enumerate(parts):
            dtype, shape = dtype_name(part.values.dtype), list(part.values.shape)
            told = StatePart(head.shard, head.round, number, part.name, dtype, shape, part.first)
            self._parts[number] = told, cut(part.values.contiguous())
        self._head_known = False
        #: By number of an unacknowledged part: when it was sent last. The head has the number -1.
        self._sent_at: dict[int, float] = {}

    @property
    def done(self) -> bool:
        """Return True if all parts are acknowledged."""
        return self._head_known and not self._parts

    def got(self, ack: StatePartAck) -> None:
        """Take an acknowledgement of a part."""
        if (ack.shard, ack.round) == (self.head.shard, self.head.round):
            self._head_known = True
            self._parts.pop(ack.number, None)
            self._sent_at.pop(ack.number, None)

    def due(self, now: float) -> Iterator[tuple[Body, Frames]]:
        """Yield the messages that are due at `now`."""
        if not self._head_known:
            if self._is_due(-1, now):
                yield self.head, ()
            return
        under_way = 0
        for number, (part, frames) in self._parts.items():
            size = sum(len(frame) for frame in frames)
            if under_way and under_way + size > CREDIT_BYTES:
                return
            under_way += size
            if self._is_due(number, now):
                yield part, frames

    def _is_due(self, number: int, now: float) -> bool:
        if now < self._sent_at.get(number, float("-inf")) + SEND_AGAIN_S:
            return False
        self._sent_at[number] = now
        return True


class Incoming(TensorFiles):
    """The receiver's side: the tensors of the state that `head` announced, read like the files of a checkpoint.

    Parts with rows go to `put_rows(name, first, rows)` instead. It raises WireError if they do not fit.
    """

    def __init__(self, head: StateHeader, put_rows: Callable[[str, int, torch.Tensor], None]) -> None:
        super().__init__(())
        self.head = head
        self._put_rows = put_rows
        self._tensors: dict[str, torch.Tensor] = {}
        self._missing = set(range(head.parts))

    @property
    def complete(self) -> bool:
        return not self._missing

    def put(self, part: StatePart, frames: Frames) -> None:
        """Store a part. Raises WireError if the part does not belong to the state."""
        what = f"part {part.number} of the state of server-{part.shard}"
        numel = math.prod(part.shape)
        if part.number >= self.head.parts or len(part.shape) > _MOST_DIMENSIONS or numel > _MOST_ELEMENTS:
            raise WireError(f"{what} does not belong to the state")
        if part.number in self._missing:
            values = join(iter(frames), part.dtype, numel, what).view(part.shape)
            if part.first >= 0:
                self._put_rows(part.name, part.first, values)
            else:
                self._tensors[part.name] = values
                self._index(part.name)
            self._missing.remove(part.number)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]
