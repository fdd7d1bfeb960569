"""The header of every message. Its body is MessagePack, and is decoded into one of the typed messages or refused."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from roundtable.common.config.field_types import Count, Name
from roundtable.common.protocol.messages.commit import (
    AllNorms,
    CloseRound,
    HoldUpdates,
    Mean,
    Metrics,
    Norms,
    Report,
    ReportAck,
    RoundReady,
    UpdatesHeld,
)
from roundtable.common.protocol.messages.embedding import InitialRows, RowAck, RowPull, RowPush, Rows
from roundtable.common.protocol.messages.gradients import Ack, Pull, Push, VersionExpired, Weights, WeightsCredit
from roundtable.common.protocol.messages.kv import KvPull, KvPush, KvReply
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
from roundtable.common.protocol.messages.saving import CheckpointStatus, ModelPart, Recomputed, SendModel, TakeCheckpoint
from roundtable.common.protocol.messages.session import (
    AskPast,
    Collective,
    CollectiveOutcome,
    CollectiveParts,
    EndRun,
    Goodbye,
    Heartbeat,
    Hello,
    KeepState,
    MembershipUpdate,
    MembersLost,
    Past,
    Reassign,
    Refused,
    RequestWork,
    Stop,
    Welcome,
)
from roundtable.common.protocol.messages.setup import (
    Accepted,
    InitialWeights,
    OfferSharedMemory,
    Plan,
    PlanReply,
    Setup,
    SetupReply,
    SharedMemoryReply,
)
from roundtable.common.protocol.messages.sharded import LayerAck, LayerPush, ShardedForward, ShardedForwardReply
from roundtable.common.runtime.errors import UsageError, WireError

T = TypeVar("T")
Message = (
    Hello | Welcome | Refused | Heartbeat | MembershipUpdate | RequestWork | Reassign | MembersLost | Stop
    | Setup | SetupReply | Plan | PlanReply | Accepted | InitialWeights | OfferSharedMemory | SharedMemoryReply
    | Push | Ack | Pull | Weights | WeightsCredit | VersionExpired
    | InitialRows | RowPull | Rows | RowPush | RowAck | ShardedForward | ShardedForwardReply | LayerPush | LayerAck
    | Report | ReportAck | RoundReady | CloseRound | Norms | AllNorms | TakeCheckpoint | CheckpointStatus
    | Replicate | ReplicateRows | ReplicateLayers | RoundReplicated | RoundReplicatedAck
    | RequestState | StateHeader | StatePart | StatePartAck
    | EndRun | HoldUpdates | UpdatesHeld | Collective | CollectiveParts | CollectiveOutcome
    | KeepState | AskPast | Past
    | Mean | Metrics | Goodbye | Recomputed | SendModel | ModelPart | KvPush | KvPull | KvReply
)  # fmt: skip
#: Largest size of a Hello, in bytes.
_MOST_HELLO_BYTES = 64 << 10
_MESSAGE = msgspec.msgpack.Decoder(Message)
_HELLO = msgspec.msgpack.Decoder(Hello)


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """The contents of every header. The body stays bytes until its sender is known: of a stranger, only a Hello is decoded.

    `run` is empty until the coordinator's Welcome has named the run. `incarnation` tells a process from others of its name; in
    messages from workers to servers it is the worker's ticket. `epoch` is the newest membership epoch that the sender knows: a
    worker's of the shares, a server's of the losses. It is 0 for other senders.
    """

    protocol: int
    run: Name
    sender: Name
    incarnation: Count
    epoch: Count
    body: msgspec.Raw

    def read(self) -> Message:
        """Return the message. Raises WireError if the body is none."""
        return self._decoded(_MESSAGE)

    def read_hello(self) -> Hello:
        """Return the Hello of an unknown sender. Raises WireError if the body is anything else."""
        if memoryview(self.body).nbytes > _MOST_HELLO_BYTES:
            raise WireError(f"a Hello of more than {_MOST_HELLO_BYTES} bytes", "oversized")
        return self._decoded(_HELLO)

    def _decoded(self, decoder: msgspec.msgpack.Decoder[T]) -> T:
        try:
            return decoder.decode(self.body)
        except (msgspec.DecodeError, UnicodeDecodeError, UsageError, RecursionError) as error:
            raise WireError(f"a message of {self.sender or 'a peer'} could not be read: {error}", "malformed") from None
