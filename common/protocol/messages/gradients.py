"""Messages of rounds between a worker and a server: contributions one way, weights the other."""

from __future__ import annotations

from typing import Literal

from roundtable.common.config.field_types import Amount, ByName, Count, CountOrNone, Few, Hypers, Many, Name
from roundtable.common.protocol.messages.base import Body

#: Means of a micro-batch's metrics x samples, and the samples, by name.
Sums = ByName[tuple[float, Amount]]


class Push(Body, frozen=True):
    """The sum over micro-batches lo..hi-1 of `round` (gradient x samples), one frame for each of `chunks` but those of parameters
    none of which had a gradient.

    Where worker and server share memory there are no frames: the values are in `slot` of the worker's region, and stay there
    until the round is applied. They are still to be multiplied by `scale`, a power of two.
    What is sent `early`, while the rest of it is being computed, is only kept: it counts when the same without frames says
    `confirm`.
    Where workers step locally, `lo` is the worker's number and `round` counts merges. `present[i]` has bit p set where
    piece p of chunks[i] had a gradient, or is a buffer that has changed. `metrics` (only to server 0, once per span) maps
    names to [sum x samples, samples]. `base` is the version of the weights it was computed from, and `hypers` the parameter
    groups' settings for the round. The frames of `coded`, some of `chunks`, are the push codec's (`common/codecs/registry.py`);
    `scale` is in them already. Unless the whole contribution, on all servers, is `finite`, it moves nothing. Where workers step
    locally, values are multiplied by `weight`, and not by samples.
    """

    round: Count
    lo: Count
    hi: Count
    samples: Count
    micro_batches: Count
    chunks: Many[Count]
    present: Many[int]
    base: Count = 0
    metrics: Sums | None = None
    hypers: Many[Hypers] = []
    slot: CountOrNone = -1
    scale: float = 1.0
    stage: Literal["whole", "early", "confirm"] = "whole"
    coded: Many[Count] = []
    finite: bool = True
    weight: Count = 0

    @property
    def key(self) -> tuple[int, int, int]:
        """Which contribution it is, or is a part of."""
        return self.round, self.lo, self.hi


class Ack(Body, frozen=True):
    """That push (`chunks`, and the metrics if it had any) needs not be sent again. No copy of it has counted in the chunks
    `ignored`: others did that before, or the round is over. `early`: it is here, and does not count yet."""

    round: Count
    lo: Count
    hi: Count
    chunks: Many[Count]
    metrics: bool = False
    early: bool = False
    ignored: Many[Count] = []


class Residual(Body, frozen=True):
    """What a push codec with error feedback has left out of `chunk` so far, in a float32 frame for each of its state's `names`.
    It is one of `of` such messages; where there is nothing, `of` is 0 and `chunk` -1. From a worker it is for the snapshot of
    round `cut`, or, as it leaves (-1), for somebody else to send, and `taken` are the numbers of what it has got of that server,
    which is in this; from a server it is what that worker is to send. Answered by Ready with its `number`."""

    chunk: CountOrNone = -1
    names: Few[Name] = []
    of: Count = 0
    number: Count = 0
    cut: CountOrNone = -1
    taken: Many[Count] = []


class Pull(Body, frozen=True):
    """Send me the weights to start round `clock` from: all chunks but `have`. `settled`: only when all before is applied.

    `shared`: tell me where they are in the server's memory instead; `plane` is the one that the model's weights are in now.
    `number` counts a worker's pulls: it is the same when one is sent again. `holds` is the version that the worker has got whole
    from this server in frames (-1: none), and changes can be added to. `masters`: send the weights that no codec has rounded.
    Frozen chunks that nothing was contributed to are sent only for `still`.
    """

    clock: Count
    number: Count = 0
    have: Many[Count] = []
    settled: bool = False
    shared: bool = False
    plane: CountOrNone = -1
    holds: CountOrNone = -1
    masters: bool = False
    still: bool = False


class Weights(Body, frozen=True):
    """Weights to start round `clock` from, one frame for each of `chunks`; or no frame and the `plane` of the server's memory
    that they lie in. `closed`: the server has got and applied all there is to earlier rounds; weights that are still missing
    then follow by themselves. The frames of `coded`, some of `chunks`, are the weight codec's: of the weights, or of their change
    since the version before. `cut` is the round of a snapshot for which the server is to be told what is Owed (-1: none).
    `still` are more chunks, frozen ones that lie in the plane `home`, which nobody writes to again. `moved`, in what is `closed`,
    are all frozen chunks that something was contributed to: they come with every round."""

    clock: Count
    version: Count
    chunks: Many[Count]
    closed: bool = False
    plane: CountOrNone = -1
    coded: Many[Count] = []
    cut: CountOrNone = -1
    still: Many[Count] = []
    home: CountOrNone = -1
    moved: Many[Count] = []


class WeightsCredit(Body, frozen=True):
    """The frames of these chunks of the weights for round `clock` are here: there is room for more."""

    clock: Count
    chunks: Many[Count]


class VersionExpired(Body, frozen=True):
    """Round `clock` is over and its weights are gone; the newest are those of round `newest`."""

    clock: Count
    newest: Count
