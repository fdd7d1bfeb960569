"""The state of a shard on its way from one server to another, in the parts of a checkpoint, which never touch a disk.

A part of a tensor that may be large is some of its rows. They are put in their place as they come, so no process has them twice.

State machines without a socket or a clock. Invariants: no more than CREDIT_BYTES are under way, or one part; what is not
acknowledged is sent again; what has come is whole, or not used.
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

#: Bytes of state that may be on their way to a server.
CREDIT_BYTES = 8 << 20
#: Dimensions and elements that a tensor of a state may have at most.
_MOST_DIMENSIONS, _MOST_ELEMENTS = 64, 1 << 40


class Outgoing:
    """Sends `parts`, which stay as they are, after the `head` that announces them."""

    def __init__(self, head: StateHeader, parts: Sequence[Part]) -> None:
        self.head = head
        self._parts: dict[int, tuple[StatePart, Frames]] = {}
        for number, part in enumerate(parts):
            dtype, shape = dtype_name(part.values.dtype), list(part.values.shape)
            told = StatePart(head.shard, head.round, number, part.name, dtype, shape, part.first)
            self._parts[number] = told, cut(part.values.contiguous())
        self._head_known = False
        #: When parts that are not acknowledged were sent; the head is -1.
        self._sent_at: dict[int, float] = {}

    @property
    def done(self) -> bool:
        """Whether all of it has arrived."""
        return self._head_known and not self._parts

    def got(self, ack: StatePartAck) -> None:
        """A part has arrived."""
        if (ack.shard, ack.round) == (self.head.shard, self.head.round):
            self._head_known = True
            self._parts.pop(ack.number, None)
            self._sent_at.pop(ack.number, None)

    def due(self, now: float) -> Iterator[tuple[Body, Frames]]:
        """What to send now."""
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
    """The tensors that have come of what `head` announced: to read them is to read a checkpoint's files. Rows are given to
    `put_rows` (name, first, rows) instead, which raises WireError where they do not fit."""

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
        """Raises WireError for what is none of its parts."""
        what = f"part {part.number} of the state of server-{part.shard}"
        numel = math.prod(part.shape)
        if part.number >= self.head.parts or len(part.shape) > _MOST_DIMENSIONS or numel > _MOST_ELEMENTS:
            raise WireError(f"{what} is none")
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
