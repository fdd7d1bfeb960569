"""The effects that state machines ask their drivers for, and the names of receivers."""

from __future__ import annotations

from dataclasses import dataclass

from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.replication import (
    Replicate,
    ReplicateLayers,
    ReplicateRows,
    RequestState,
    RoundReplicated,
    RoundReplicatedAck,
    StateHeader,
    StatePart,
    StatePartAck,
)
from roundtable.common.protocol.transport import Frames

COORDINATOR = "coordinator"
#: The server with the backup of this one's shard.
BACKUP = "backup"
#: The messages that servers send to each other.
AboutCopies = (
    Replicate
    | ReplicateRows
    | ReplicateLayers
    | RoundReplicated
    | RoundReplicatedAck
    | RequestState
    | StateHeader
    | StatePart
    | StatePartAck
)


@dataclass(frozen=True)
class Send:
    """Effect: send `body` and `frames` to the process called `to`."""

    to: str
    body: Body
    frames: Frames = ()


def number_of(name: str) -> int:
    """Return the number in a process's name, such as 3 in 'worker-3'."""
    return int(name.rpartition("-")[2])
