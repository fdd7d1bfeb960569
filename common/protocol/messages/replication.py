"""Messages between a server and the server that has a backup of its shard."""

from __future__ import annotations

from typing import Annotated

import msgspec

from roundtable.common.config.batch_plan import Segment
from roundtable.common.config.field_types import Count, CountOrNone, Hypers, Many, Name
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.commit import Committed, Contribution
from roundtable.common.protocol.messages.setup import Setup


class Replicate(Body, frozen=True):
    """The mean contribution to `chunk` in `round`, in a frame, unless it moves nothing (`present` is 0). Clipping multiplies it
    by `factor`; `hypers` are the settings of its parameter group."""

    round: Count
    chunk: Count
    present: int = 0
    hypers: Hypers = {}
    factor: float | None = None


class ReplicateRows(Body, frozen=True):
    """What `round` contributes to the rows of all tables, summed over `samples` samples: `counts` and frames as in RowPush, the
    settings of each parameter group, and `factor` as in Forward."""

    round: Count
    samples: Count
    counts: Many[CountOrNone]
    hypers: Many[Hypers] = []
    factor: float | None = None


class LossTerms(msgspec.Struct, frozen=True, array_like=True):
    """What `count` samples contribute to a classifier, or a hidden layer; `normalised` as in Classify."""

    classifier: Count
    count: Count
    normalised: bool = False


class ReplicateLayers(Body, frozen=True):
    """What `round` contributes to classifiers over `samples` samples; the rest is as in ForwardRows. Of each of `terms` there
    follow, for every sample, features, with a 1 where there is a bias; the place of its class among the rows, int64, or -1; the
    logarithm of the sum of all exp(z), g and the gradient of its own class's logit, as in ClassPush; and what is taken off
    every p. Of hidden layers, the features and the gradient by this server's outputs."""

    round: Count
    samples: Count
    terms: Many[LossTerms]
    hypers: Many[Hypers] = []
    factor: float | None = None


class RoundReplicated(Body, frozen=True):
    """All of `round` has been forwarded. Of server 0: what the books are to have of it, and that the coordinator has all of the
    rounds below `reported`. Answered by RoundReplicatedAck."""

    round: Count
    rounds: Many[Committed] = []
    contributions: Many[Contribution] = []
    reported: Count = 0


class RoundReplicatedAck(Body, frozen=True):
    """All of `round` that is for your shard is here."""

    round: Count


class RequestState(Body, frozen=True):
    """I am in the place of the server whose shard you have a copy of: send it to me. Answered by State."""


class StateHeader(Body, frozen=True):
    """The state of server `shard`'s shard when `round` rounds are applied follows, in `parts` parts. Classifiers may still lack
    the last of them, which is `pending` then; its tensors are among the parts. Answered by StatePartAck."""

    shard: Count
    round: Count
    parts: Count
    setup: Setup
    segments: Many[Segment]
    replicated_rounds: Many[RoundReplicated] = []
    pending: ReplicateLayers | None = None


class StatePart(Body, frozen=True):
    """A tensor of that state, as snapshots call it, in the frames that follow; or its rows from `first` on."""

    shard: Count
    round: Count
    number: Count
    name: Name
    dtype: Name
    shape: Annotated[list[Count], msgspec.Meta(max_length=64)]
    first: CountOrNone = -1


class StatePartAck(Body, frozen=True):
    """That part is here; -1 is the State itself."""

    shard: Count
    round: Count
    number: CountOrNone
