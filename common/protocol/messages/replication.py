"""Messages between a server and the server that has a backup of its shard."""

from __future__ import annotations

from typing import Annotated

import msgspec

from roundtable.common.config.batch_plan import Segment
from roundtable.common.config.field_types import Amount, Count, CountOrNone, Hypers, Many, Name
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.commit import Committed, Contribution
from roundtable.common.protocol.messages.gradients import UsedSettings
from roundtable.common.protocol.messages.setup import Setup


class Replicate(Body, frozen=True):
    """The mean contribution to `chunk` in `round`, in a frame. There is no frame if it moves nothing (`present` is 0)."""

    round: Count
    chunk: Count
    present: int = 0
    #: The settings of the chunk's parameter group.
    hypers: Hypers = {}
    #: Clipping multiplies the contribution by it.
    factor: float | None = None


class ReplicateRows(Body, frozen=True):
    """The contribution of `round` to the embedding rows of all tables: a sum of gradients x weight. All weights are `weight`.

    `counts` and frames are as in RowPush, and `factor` is as in Replicate.
    """

    round: Count
    weight: Amount
    counts: Many[CountOrNone]
    #: The settings of each parameter group.
    hypers: Many[Hypers] = []
    factor: float | None = None


class LossTerms(msgspec.Struct, frozen=True, array_like=True):
    """The contribution of `count` samples to a sharded layer. `normalised` is as in ShardedForward."""

    layer: Count
    count: Count
    normalised: bool = False


class ReplicateLayers(Body, frozen=True):
    """The contribution of `round` to sharded layers. The other fields are as in ReplicateRows.

    For each of `terms`, frames follow with, for every sample:
    - its features, with a 1 if there is a bias,
    - the place of its class among the rows, int64, or -1,
    - the logarithm of the sum of all exp(z), g, and the gradient of its own class's logit, as in LayerPush,
    - what is subtracted from every p.

    For hidden layers, the features and the gradient by this server's outputs follow.
    """

    round: Count
    weight: Amount
    terms: Many[LossTerms]
    hypers: Many[Hypers] = []
    factor: float | None = None


class RoundReplicated(Body, frozen=True):
    """All of `round` has been sent to the backup. Answered by RoundReplicatedAck."""

    round: Count
    #: Of server 0: what the ledger must have of the round.
    rounds: Many[Committed] = []
    contributions: Many[Contribution] = []
    #: Of server 0: the coordinator has all rounds below.
    reported: Count = 0
    #: Of server 0: the settings of the round, if they are not those of `Setup`.
    settings: UsedSettings | None = None


class RoundReplicatedAck(Body, frozen=True):
    """All of `round` for your shard has arrived here."""

    round: Count


class RequestState(Body, frozen=True):
    """I replace the server whose backup you have: send me its state. Answered by StateHeader."""


class StateHeader(Body, frozen=True):
    """The state of server `shard`'s shard after `round` rounds follows, in `parts` parts. Answered by StatePartAck."""

    shard: Count
    round: Count
    parts: Count
    setup: Setup
    segments: Many[Segment]
    replicated_rounds: Many[RoundReplicated] = []
    #: The last round of sharded layers, if they still lack it. Its tensors are among the parts.
    pending: ReplicateLayers | None = None


class StatePart(Body, frozen=True):
    """A tensor of that state, under its name in checkpoints, in the frames that follow."""

    shard: Count
    round: Count
    number: Count
    name: Name
    dtype: Name
    shape: Annotated[list[Count], msgspec.Meta(max_length=64)]
    #: The first row that is in the frames, or -1 for the whole tensor.
    first: CountOrNone = -1


class StatePartAck(Body, frozen=True):
    """The receiver has the part. Number -1 is the StateHeader."""

    shard: Count
    round: Count
    number: CountOrNone
