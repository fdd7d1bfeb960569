"""Messages that close rounds and put them into the ledger: between servers and the coordinator, and metrics of workers."""

from __future__ import annotations

from typing import Literal

import msgspec

from roundtable.common.config.field_types import Amount, ByName, Count, Many, Name
from roundtable.common.config.weights import Weighed
from roundtable.common.protocol.messages.base import Body


class Contribution(Weighed, msgspec.Struct, frozen=True):
    """The outcome of one push, as the ledger has it.

    A micro-batch that was dropped without a push has a row without a `worker`. A push of it that arrives later is `late`.
    """

    round: Count
    lo: Count
    hi: Count
    worker: Name
    samples: Count
    micro_batches: Count
    outcome: Literal["committed", "duplicate", "dropped", "dropped in part", "late"]
    staleness: Count | None = None
    #: The weight of the push in its round's mean. None: its samples.
    weight: Amount | None = None


class Committed(Weighed, msgspec.Struct, frozen=True):
    """A round applied on server 0: its samples, micro-batches and mean metrics, which are weighted by `weight`."""

    round: Count
    samples: Count
    micro_batches: Count
    dropped: Count
    metrics: ByName[float]
    #: The weight of all that counts in the round. None: its samples.
    weight: Amount | None = None


class Report(Body, frozen=True):
    """News of a server: rounds below `version` are applied. Only server 0 reports rounds and contributions."""

    seq: Count
    version: Count
    rounds: Many[Committed] = []
    contributions: Many[Contribution] = []
    #: The server that this one replaces may have reported some of them before.
    may_repeat: bool = False
    #: Micro-batches, or parts of them, that this server has dropped under a policy that decides on each push alone (ssp, async).
    dropped: Many[Contribution] = []


class ReportAck(Body, frozen=True):
    """Reports up to `seq` are in the ledger."""

    seq: Count


class RoundReady(Body, frozen=True):
    """`backup` policy: these micro-batches of the round have fully arrived here. May the round be closed?

    A coordinator that has taken over asks all servers what may have been decided before. A server that knows it answers.
    """

    round: Count
    micro_batches: Many[Count]
    #: The incarnation of the coordinator that is asked. The server believes no earlier one any more.
    coordinator: int = 0


class CloseRound(Body, frozen=True):
    """`backup` policy: apply the round with exactly these micro-batches."""

    round: Count
    micro_batches: Many[Count]


class Norms(Body, frozen=True):
    """Gradient norms of this server's pieces for the round, as (tensor, start of piece, 2-norm).

    Embedding tables and then sharded layers are counted on from the tensors: (number, server, 2-norm). It is asked and passed
    on as `RoundReady` is.
    """

    round: Count
    norms: Many[tuple[Count, Count, float]]
    coordinator: int = 0


class AllNorms(Body, frozen=True):
    """Gradient norms of all servers' pieces, sorted."""

    round: Count
    norms: Many[tuple[Count, Count, float]]


class HoldUpdates(Body, frozen=True):
    """The run is to end early. Begin no update from number `updates` on, nor from the first that you have not begun.

    A server takes back nothing: of several such messages the latest update counts.
    """

    updates: Count
    #: The run ends after `updates` updates. If not, the coordinator is still to say after which.
    decided: bool = False


class UpdatesHeld(Body, frozen=True):
    """I begin no update from number `updates` on."""

    updates: Count
    #: I know that the run ends there.
    decided: bool = False


class Mean(Body, frozen=True):
    """Return the mean of metric `name` over `epoch`. The answer is the same message with `value`, final once `complete`."""

    epoch: Count
    name: Name
    value: float | None = None
    complete: bool = False


class Metrics(Body, frozen=True):
    """Values that the script logged outside a micro-batch, after `round` rounds."""

    id: Count
    round: Count
    values: ByName[float]
