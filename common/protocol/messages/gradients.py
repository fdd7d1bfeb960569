"""Messages of rounds between a worker and a server: contributions one way, weights the other."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from roundtable.common.config.field_types import Amount, ByName, Count, CountOrNone, Few, Hypers, Many
from roundtable.common.config.weights import Weighed
from roundtable.common.protocol.messages.base import Body

#: Sum of a metric x weight, and the weight, by name.
Sums = ByName[tuple[float, Amount]]


class Schedules(msgspec.Struct, frozen=True):
    """The script's schedulers at its step in a round."""

    #: Their numbers: a JSON list with an object for each scheduler.
    state: Annotated[str, msgspec.Meta(max_length=1 << 20)]
    #: How many steps the script makes in each round after that of the optimizer, by scheduler. Empty: the worker has not seen it.
    steps_after: Few[Count] = []


class UsedSettings(msgspec.Struct, frozen=True):
    """The settings of the parameter groups with which `round` was applied."""

    round: Count
    hypers: Many[Hypers] = []
    schedules: Schedules | None = None


class Push(Weighed, Body, frozen=True):
    """The sum over micro-batches lo..hi-1 of `round` (gradient x weight).

    One frame follows for each of `chunks`, but none for parameters without a gradient. If worker and server share memory, there
    are no frames: the values lie in the worker's `gradient_buffer`, and stay there until the round is applied.
    Where workers step locally, `lo` is the worker's number, `round` counts merges, and `weight` is the replica's in the merge.
    """

    round: Count
    lo: Count
    hi: Count
    samples: Count
    micro_batches: Count
    chunks: Many[Count]
    #: `present[i]` has bit p set if piece p of chunks[i] had a gradient, or is a buffer that has changed.
    present: Many[int]
    #: The version of the weights from which the contribution was computed.
    base_version: Count = 0
    #: Only to server 0, and once for these micro-batches.
    metrics: Sums | None = None
    #: The settings of the parameter groups for the round.
    hypers: Many[Hypers] = []
    gradient_buffer: CountOrNone = -1
    #: A power of two by which the values must be multiplied. Frames of a codec contain it already.
    scale: float = 1.0
    #: A two-phase commit. A `tentative` push comes while the worker computes the rest of the contribution. Servers only keep it.
    #: It counts when a push of the same micro-batches without frames says `commit`.
    stage: Literal["complete", "tentative", "commit"] = "complete"
    #: Those of `chunks` whose frames are the push codec's (`common/codecs/registry.py`).
    coded: Many[Count] = []
    #: False if any part of the whole contribution, on any server, is not finite: then the contribution moves nothing.
    finite: bool = True
    #: The weight of these micro-batches in the round's mean, which the values are multiplied by. None: their samples.
    weight: Amount | None = None
    #: With `metrics`, if the script has schedulers.
    schedules: Schedules | None = None

    @property
    def key(self) -> tuple[int, int, int]:
        """Return the micro-batches of which this is the contribution, or a part of it."""
        return self.round, self.lo, self.hi


class Ack(Body, frozen=True):
    """This push need not be sent again."""

    round: Count
    lo: Count
    hi: Count
    chunks: Many[Count]
    #: The push had metrics, and they are here.
    metrics: bool = False
    #: The push is here, and does not count yet.
    tentative: bool = False
    #: Chunks in which no copy of the push has counted: other pushes did that before, or the round is over.
    ignored: Many[Count] = []


class Pull(Body, frozen=True):
    """Send me the weights with which round `for_round` starts: all chunks but `have_chunks`."""

    for_round: Count
    #: Counts a worker's pulls. A pull that is sent again has the same number.
    number: Count = 0
    have_chunks: Many[Count] = []
    #: Send the weights only when all updates before `for_round` are applied.
    after_all_updates: bool = False
    #: Say where in the server's memory the weights are instead of sending them.
    shared: bool = False
    #: The weight buffer in which the model's weights are now.
    weight_buffer: CountOrNone = -1
    #: The version that the worker has got whole from this server in frames, to which changes can be added, or -1.
    held_version: CountOrNone = -1
    #: Send the weights that no codec has rounded.
    full_precision: bool = False
    #: Send frozen chunks too to which nothing was contributed.
    frozen: bool = False


class Weights(Body, frozen=True):
    """Weights with which round `for_round` starts: a frame for each of `chunks`, or the `weight_buffer` in which they lie."""

    for_round: Count
    version: Count
    chunks: Many[Count]
    #: The server has got and applied all contributions to earlier rounds. Weights that are still missing follow by themselves.
    round_closed: bool = False
    weight_buffer: CountOrNone = -1
    #: Those of `chunks` whose frames are the weight codec's: of the weights, or of their change since the version before.
    coded: Many[Count] = []
    #: More chunks: frozen ones, which lie in `frozen_buffer`. Nothing writes to that buffer again.
    frozen_chunks: Many[Count] = []
    frozen_buffer: CountOrNone = -1
    #: With `round_closed`: all frozen chunks to which something was contributed. They come with every round.
    changed_frozen: Many[Count] = []
    #: Of server 0, with `round_closed`: the settings of the round before, if they are not those of `Setup`.
    settings: UsedSettings | None = None


class WeightsCredit(Body, frozen=True):
    """The frames of these chunks of the weights for round `for_round` have arrived. The server may send more."""

    for_round: Count
    chunks: Many[Count]


class VersionExpired(Body, frozen=True):
    """Round `for_round` is over, and the server has not kept its weights. The newest weights are those of round `newest`."""

    for_round: Count
    newest: Count
