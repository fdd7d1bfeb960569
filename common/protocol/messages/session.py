"""Messages of joining, staying in touch, sharing the work, and leaving: between the coordinator and all others."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from roundtable.common.config.field_types import Amount, ByName, Count, CountOrNone, Few, Many, Name, Text
from roundtable.common.config.settings import Settings
from roundtable.common.config.work_shares import ShareTable
from roundtable.common.network.host_identity import NOWHERE, Place
from roundtable.common.protocol.messages.base import Body, sent_reason
from roundtable.common.protocol.rejections import Kind
from roundtable.common.runtime.errors import printable

#: Micro-batches that a Heartbeat tells of, the first ones, in each of its lists: it is kept, and every process has one.
MOST_TOLD = 1 << 14
Told = Annotated[list[Count], msgspec.Meta(max_length=MOST_TOLD)]


class Hello(Body, frozen=True):
    """May I take part? `address` is where workers reach a server. `arithmetic` is what equal bits need to be equal.
    `host` is a name for people; `place` is what tells hosts apart."""

    role: Literal["server", "worker"]
    index: Count | None = None
    address: Annotated[str, msgspec.Meta(max_length=300)] = ""
    host: Annotated[str, msgspec.Meta(max_length=300)] = ""
    pid: Count = 0
    arithmetic: ByName[Name] = {}
    place: Place = NOWHERE

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "host", printable(self.host))


class Peer(msgspec.Struct, frozen=True, array_like=True):
    """A server, by where it is reached. Another incarnation is another process, which has the shard of the one before it. Only
    servers are told the true one."""

    address: Annotated[str, msgspec.Meta(max_length=300)]
    incarnation: Count


class Welcome(Body, frozen=True):
    """You are `process` of run `run`. Sent when all expected processes are there. The run directory is `run_dir` where the
    coordinator is; the run goes on from the snapshot of round `resume` in it (-1: it begins). `replaces`: you are in the place
    of a server that is gone, and the next one has a copy of its shard. A worker writes `ticket` on what it sends to servers
    (`common/protocol/tickets.py`), which check it with `key`."""

    process: Name
    run: Name
    settings: Settings
    servers: Many[Peer]
    tables: Annotated[list[ShareTable], msgspec.Meta(min_length=1, max_length=1000)]
    run_dir: Text = ""
    resume: int = -1
    replaces: bool = False
    ticket: Count = 0
    key: Annotated[bytes, msgspec.Meta(max_length=64)] = b""


class Refused(Body, frozen=True):
    """No, and why, in a sentence. `about` is the type of the refused message."""

    about: Name
    reason: Text

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "reason", sent_reason(self.reason))


class Traffic(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a process has had to do with tensors in frames so far: bytes that a worker has sent and received, repetitions
    included, and seconds that codecs took."""

    pushed_bytes: Count = 0
    pulled_bytes: Count = 0
    encode_seconds: Amount = 0.0
    decode_seconds: Amount = 0.0


class Heartbeat(Body, frozen=True):
    """I am alive. A worker tells where it is; the coordinator's answer is a Heartbeat as well.

    `round` is the round worked on or waited for, `at` its micro-batch being computed (-1: none), `left` those leased and not
    begun, `sent` those pushed that servers have not acknowledged, `seconds` how long a micro-batch takes, `rate` samples per
    second while computing, `transfer` seconds until servers have a contribution. Of a server, `round` is the open one, `left`
    its micro-batches that have not arrived, and `at` grows while it is at something that takes long. Of a script without rounds,
    `at` counts answers of the key-value store. `keeps` are the servers of whose shards it has a whole copy. `refused` are the
    messages that were refused here so far, by kind.

    Where many rounds can be open, a worker in round `reached` may be at a micro-batch of an earlier one, and `taken` are those
    (round, micro-batch) that it has taken over and not begun, of other rounds than `round`; and `later` are micro-batches that
    have not arrived at a server, of each of the rounds after its earliest open one.

    `unreached` are numbers of servers to which this process has had no connection for a while. To a process that has joined a
    run which has not started, the coordinator says who is `missing`.

    A process that was told to stop says that it `leaves`, and goes on until it may. The coordinator answers a worker likewise,
    and counts a server as lost.

    `unsteady` is the first parameter whose gradient had other bits when a worker computed its first micro-batch a second time.
    """

    state: Literal["", "starting", "computing", "waiting", "done"] = ""
    round: CountOrNone = -1
    at: CountOrNone = -1
    left: Told = []
    sent: Told = []
    seconds: Amount = 0.0
    rate: Amount = 0.0
    transfer: Amount = 0.0
    traffic: Traffic = Traffic()
    keeps: Few[Count] = []
    refused: Annotated[dict[Kind, Count], msgspec.Meta(max_length=20)] = {}
    reached: CountOrNone = -1
    taken: Annotated[list[tuple[Count, Count]], msgspec.Meta(max_length=MOST_TOLD)] = []
    later: Annotated[list[Told], msgspec.Meta(max_length=MOST_TOLD)] = []
    missing: Name = ""
    unreached: Few[Count] = []
    leaves: bool = False
    unsteady: Name = ""

    def __post_init__(self) -> None:
        if self.later and sum(map(len, self.later)) > MOST_TOLD:
            raise ValueError(f"more than {MOST_TOLD} micro-batches are told to be missing in later rounds")


class MembershipUpdate(Body, frozen=True):
    """The shares in force from some rounds on, oldest first; a new one opens a membership epoch. The servers are these."""

    tables: Annotated[list[ShareTable], msgspec.Meta(min_length=1, max_length=1000)]
    servers: Many[Peer] = []


class RequestWork(Body, frozen=True):
    """My micro-batches of `round` are done and it is not complete: is there one that I can take over?"""

    round: Count


class Reassign(Body, frozen=True):
    """Micro-batch `k` of `round` is now `to`'s; `owner`, who had it, leaves it out unless it is being computed."""

    round: Count
    k: Count
    to: Name
    owner: Name


class MembersLost(Body, frozen=True):
    """To servers: as of membership epoch `epoch` these workers are lost, or have left early. Refuse what they send, and keep
    nothing for them. The servers are these. Who knows it has that epoch in its headers."""

    epoch: Count
    workers: Many[Name]
    servers: Many[Peer] = []


class Stop(Body, frozen=True):
    """The run is over. `ok`: finished and saved. Else `reason` is a sentence; `again`: it goes on, from its newest snapshot or
    just without you, so begin anew; `told`: somebody has told it to stop, and it can go on later."""

    ok: bool
    reason: Text = ""
    again: bool = False
    told: bool = False

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "reason", sent_reason(self.reason))


class Goodbye(Body, frozen=True):
    """My script has ended, when `round` rounds were in my model. `reason` is a sentence if it failed. Answered by Stop when the
    run is over; at once where others do what I have not done, as I leave before the last round, or as I was asked to (`early`).
    `cut_off`: I failed as a server did not answer me, which may well answer others. `keyed`: I have used the key-value store, so
    nobody can do what I have not done. `changed` are tensors of the model that the script has changed since its last round."""

    reason: Text = ""
    early: bool = False
    cut_off: bool = False
    keyed: bool = False
    round: Count = 0
    changed: Annotated[list[Name], msgspec.Meta(max_length=100)] = []

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "reason", sent_reason(self.reason))
