"""Messages of joining, staying in touch, sharing the work, and leaving: between the coordinator and all others."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from roundtable.common.config.batch_plan import Segment
from roundtable.common.config.field_types import MOST, Amount, ByName, Count, CountOrNone, Few, Many, Name, Text
from roundtable.common.config.settings import Settings
from roundtable.common.config.work_shares import ShareTable
from roundtable.common.network.host_identity import NOWHERE, Place
from roundtable.common.protocol.messages.base import Body, sent_reason
from roundtable.common.protocol.rejections import Kind
from roundtable.common.runtime.errors import printable

#: Micro-batches in each list of a Heartbeat, at most: the first ones. Every process has one, and the coordinator keeps it.
MOST_MICRO_BATCHES = 1 << 14
MicroBatches = Annotated[list[Count], msgspec.Meta(max_length=MOST_MICRO_BATCHES)]


class Hello(Body, frozen=True):
    """May I take part?"""

    role: Literal["server", "worker"]
    index: Count | None = None
    #: Where workers reach this server.
    address: Annotated[str, msgspec.Meta(max_length=300)] = ""
    #: The host's name for people.
    host: Annotated[str, msgspec.Meta(max_length=300)] = ""
    pid: Count = 0
    #: Versions and traits of the processor that must be equal for equal bits.
    arithmetic: ByName[Name] = {}
    #: The place of the process, which tells hosts apart.
    place: Place = NOWHERE

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "host", printable(self.host))


class Peer(msgspec.Struct, frozen=True, array_like=True):
    """A server, and where it is reached.

    A process that replaces a server has the same shard and another incarnation. Only servers are told the true incarnation.
    """

    address: Annotated[str, msgspec.Meta(max_length=300)]
    incarnation: Count


class Welcome(Body, frozen=True):
    """You are `process` of run `run`. The coordinator sends it when all expected processes are there."""

    process: Name
    run: Name
    settings: Settings
    servers: Many[Peer]
    share_tables: Annotated[list[ShareTable], msgspec.Meta(min_length=1, max_length=1000)]
    #: The run directory, for the coordinator.
    run_dir: Text = ""
    #: The round of the checkpoint in `run_dir` from which the run goes on, or -1.
    resume: int = -1
    #: You replace a lost server, and the next server has a backup of its shard.
    replaces: bool = False
    #: A worker writes it on what it sends to servers (`common/protocol/tickets.py`).
    ticket: Count = 0
    #: Servers check tickets with it.
    key: Annotated[bytes, msgspec.Meta(max_length=64)] = b""
    #: The run ends after so many updates, because a script has asked for it; -1 if none has.
    ends_after: CountOrNone = -1


class Refused(Body, frozen=True):
    """No, and why, in a sentence."""

    #: The type of the refused message.
    about: Name
    reason: Text

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "reason", sent_reason(self.reason))


class Traffic(msgspec.Struct, frozen=True, omit_defaults=True):
    """The traffic of a process so far: tensors in frames, and the time that codecs took."""

    #: Bytes that a worker has sent, repetitions included.
    pushed_bytes: Count = 0
    #: Bytes that a worker has received.
    pulled_bytes: Count = 0
    #: Seconds that codecs took.
    encode_seconds: Amount = 0.0
    decode_seconds: Amount = 0.0


class Heartbeat(Body, frozen=True):
    """I am alive, and this is where I am. The coordinator answers with a Heartbeat.

    A worker says what it computes, and a server what it lacks. A process keeps to itself what is empty.
    """

    state: Literal["", "starting", "computing", "waiting", "done"] = ""
    #: The round that a worker works on or waits for, or the open round of a server.
    round: CountOrNone = -1
    #: The micro-batch of `round` that a worker computes, or -1.
    micro_batch: CountOrNone = -1
    #: Micro-batches of `round` that are this worker's and that it has not begun.
    not_started: MicroBatches = []
    #: Micro-batches that this worker has pushed and that servers have not acknowledged.
    unacknowledged: MicroBatches = []
    #: Seconds that a micro-batch takes this worker.
    seconds: Amount = 0.0
    #: Samples per second of this worker while it computes.
    rate: Amount = 0.0
    #: Seconds until servers have a contribution of this worker.
    transfer: Amount = 0.0
    traffic: Traffic = Traffic()
    #: Numbers of the servers of whose shards this server has a whole backup.
    replicas_held: Few[Count] = []
    #: Messages that this process has refused so far, by kind.
    refused: Annotated[dict[Kind, Count], msgspec.Meta(max_length=20)] = {}
    #: The round that a worker has reached if several rounds may be open. `round` may be an earlier one then.
    reached: CountOrNone = -1
    #: (round, micro-batch) that were reassigned to this worker and that it has not begun, of other rounds than `round`.
    reassigned_here: Annotated[list[tuple[Count, Count]], msgspec.Meta(max_length=MOST_MICRO_BATCHES)] = []
    #: Micro-batches that have not arrived at this server, for each of the rounds after `round`.
    missing_later: Annotated[list[MicroBatches], msgspec.Meta(max_length=MOST_MICRO_BATCHES)] = []
    #: From the coordinator, before the run starts: the processes that the run still waits for.
    awaited: Name = ""
    #: Numbers of servers to which this process has had no connection for a while.
    unreached: Few[Count] = []
    #: This process was told to stop. It goes on until it may leave. The coordinator says so to a worker that may leave.
    leaves: bool = False
    #: The first parameter whose gradient had other bits when this worker computed its first micro-batch a second time.
    unsteady: Name = ""
    #: Micro-batches of `round` that have not arrived at this server.
    missing: MicroBatches = []
    #: Grows while a server does something that takes long, and with each answer of the key-value store to a worker.
    progress: Count = 0
    #: From the coordinator to a worker: as in Welcome.
    ends_after: CountOrNone = -1

    def __post_init__(self) -> None:
        if self.missing_later and sum(map(len, self.missing_later)) > MOST_MICRO_BATCHES:
            raise ValueError(f"more than {MOST_MICRO_BATCHES} micro-batches are told to be missing in later rounds")


class MembershipUpdate(Body, frozen=True):
    """A new membership epoch: the share tables in force, oldest first, and the servers."""

    share_tables: Annotated[list[ShareTable], msgspec.Meta(min_length=1, max_length=1000)]
    servers: Many[Peer] = []


class RequestWork(Body, frozen=True):
    """My micro-batches of `round` are done, and the round is not complete. Is there a micro-batch for me?"""

    round: Count


class Reassign(Body, frozen=True):
    """Micro-batch `micro_batch` of `round` now belongs to worker `to`. `owner` leaves it out, unless it computes it already."""

    round: Count
    micro_batch: Count
    to: Name
    owner: Name


class MembersLost(Body, frozen=True):
    """To servers: `workers` are lost or have left early. Refuse what they send, and keep nothing for them.

    A server that knows this writes `epoch` in its headers.
    """

    #: The membership epoch from which this holds.
    epoch: Count
    workers: Many[Name]
    #: The servers of the run.
    servers: Many[Peer] = []


class Stop(Body, frozen=True):
    """The run is over, or this process must restart."""

    #: The run has finished, and its results are written.
    ok: bool
    #: Why the run has ended, in a sentence.
    reason: Text = ""
    #: The run goes on, from its newest checkpoint or just without this process, which is to restart.
    restart: bool = False
    #: The run was told to stop. It can go on later.
    on_request: bool = False

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "reason", sent_reason(self.reason))


class EndRun(Body, frozen=True):
    """My script asks for the end of the run, after `updates` updates or as soon as may be after them.

    The coordinator answers with a Heartbeat that says after which update the run ends.
    """

    updates: Count
    #: Why, in a sentence.
    reason: Text

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "reason", sent_reason(self.reason))


#: Bytes of a script's state, at most.
MOST_STATE_BYTES = 1 << 20
#: The names under which a script may save its model. That of the trained model is not among them.
MODEL_NAME = r"^((?!model$)[A-Za-z0-9][A-Za-z0-9_-]*)?$"
#: Parts that a worker gets, or has done, at a time.
MOST_PARTS = 1000


class PartDone(msgspec.Struct, frozen=True, array_like=True):
    """The result of a part of a collective."""

    part: Count
    #: Of an agreement: the chief's value, in MessagePack.
    value: Annotated[bytes, msgspec.Meta(max_length=1 << 16)] = b""
    #: Of an evaluation, by metric: the sum of metric x weight, and the weight.
    sums: ByName[tuple[float, float]] = {}


class Collective(Body, frozen=True):
    """My script is at this collective. What am I to compute of it, or what is its outcome?

    Two scripts are at the same collective if they have begun as many `loops` over batches, and as many collectives since then.
    """

    loops: Count
    number: Count
    kind: Literal["agree", "evaluate", "save"]
    #: Parts that have to be done: of an evaluation its batches, else 1.
    parts: Annotated[int, msgspec.Meta(ge=1, le=MOST)]
    #: Of a model to save: its name.
    name: Annotated[str, msgspec.Meta(max_length=100)] = ""
    #: Of an evaluation: the samples in all its batches.
    samples: Count = 0
    #: The round of the weights in the model.
    round: Count = 0
    done: Annotated[list[PartDone], msgspec.Meta(max_length=MOST_PARTS)] = []


class CollectiveParts(Body, frozen=True):
    """Compute these parts of the collective, and ask again. With no parts: others compute what is left."""

    loops: Count
    number: Count
    parts: Annotated[list[Count], msgspec.Meta(max_length=MOST_PARTS)]
    #: How many parts are not done.
    missing: Count = 0


class CollectiveOutcome(Body, frozen=True):
    """The outcome of the collective. It is the same for all workers, also for those that come later."""

    loops: Count
    number: Count
    value: Annotated[bytes, msgspec.Meta(max_length=1 << 16)] = b""
    #: Of an evaluation: the weighted mean of each metric.
    means: ByName[float] = {}


class KeepState(Body, frozen=True):
    """Keep this as my script's state after `round` rounds. The coordinator answers with Accepted, with the same `id`."""

    id: Count
    round: Count
    value: Annotated[bytes, msgspec.Meta(max_length=MOST_STATE_BYTES)]


class AskPast(Body, frozen=True):
    """My model has `round` rounds. Which loops over batches lie behind my script, and what was its state before that round?"""

    round: Count


class Past(Body, frozen=True):
    """The loops that ended before `round`, and the newest state that was kept before it: empty if none was."""

    round: Count
    segments: Many[Segment] = []
    state: Annotated[bytes, msgspec.Meta(max_length=MOST_STATE_BYTES)] = b""


class Goodbye(Body, frozen=True):
    """My script has ended, when `round` rounds were in my model.

    The coordinator answers with Stop when the run is over. It answers at once if others do the rest of this worker's work.
    """

    #: Why the script failed, in a sentence. '' if it did not.
    reason: Text = ""
    #: The worker leaves before the last round, or was asked to leave.
    early: bool = False
    #: The worker failed because a server did not answer it. The server may well answer others.
    cut_off: bool = False
    #: The worker has used the key-value store, so no other worker can do the rest of its work.
    used_kv: bool = False
    round: Count = 0
    #: Tensors of the model that the script has changed since its last round.
    changed: Annotated[list[Name], msgspec.Meta(max_length=100)] = []

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "reason", sent_reason(self.reason))
