"""Messages of layers that servers compute. common/model/sparse_rows.py says how their frames are cut."""

from __future__ import annotations

import msgspec

from roundtable.common.config.field_types import Count, CountOrNone, Hypers, Many
from roundtable.common.protocol.messages.base import Body


class ShardedForward(Body, frozen=True):
    """Go through your classes for `count` samples, as they are at the beginning of round `version`: their features (count, dim)
    follow, float32, and unless `top` their labels, int64.

    Where that version is gone, what is for training (`keeps`) is refused, and all else answered from the present one. Where each
    push is applied at once, everything is. `top`: I
    want the so many best classes of each sample. `normalised`: rows count as of length 1. `sums`: I need the sum of all rows too.

    Of a hidden layer: I want its outputs; only features follow. Or (`back_through` is the number of that question) its loss's
    gradient by the features; the gradient by your outputs follows, (count, rows), and then the features if you may not know
    them (`with_features`).
    """

    number: Count
    classifier: Count
    version: Count
    count: Count = 0
    keeps: bool = False
    normalised: bool = False
    sums: bool = False
    top: Count = 0
    back_through: CountOrNone = -1
    with_features: bool = False


class ShardedForwardReply(Body, frozen=True):
    """Answer to Classify `number`. Over the server's classes but a sample's own, with z a logit, the largest z, the sum of
    exp(z - largest), and the sum of exp(z - largest) x row follow, for each sample; then the sum of all rows where it was wanted;
    then the rows of labels that are here, in the order of the samples.

    Or the best logits of each sample and their classes, int64; or of a hidden layer, this server's outputs (count, rows) or its
    part of the features' gradient (count, D); or nothing, as the version that was wanted is `gone`.
    """

    number: Count
    gone: bool = False


class LayerUse(msgspec.Struct, frozen=True, array_like=True):
    """What a micro-batch contributes through its question `number`, of `count` samples. Every class but a sample's own has a
    logit's gradient of (p - smoothing) x g. Of a hidden layer it is the question about the features' gradient, whose gradient by
    outputs is to be multiplied by `scale`; nothing more is told of it."""

    number: Count
    count: Count
    smoothing: float = 0.0
    scale: float = 1.0


class LayerPush(Body, frozen=True):
    """What micro-batches lo..hi-1 of `round` contribute to classifiers, in order of the micro-batches. Of each of `uses`, there
    follow for every sample the logarithm of the sum of all exp(z); g, the gradient of its loss x samples; and the gradient
    of its own class's logit, which is in there already. Features and labels are those that were asked about: of questions
    that you may not know, as you have taken another server's place, they come first (`questions`). `base_version` and `finite`
    are as in Push."""

    round: Count
    lo: Count
    hi: Count
    samples: Count
    uses: Many[LayerUse]
    hypers: Many[Hypers] = []
    base_version: Count = 0
    finite: bool = True
    questions: Many[ShardedForward] = []


class LayerAck(Body, frozen=True):
    """That LayerPush needs not be sent again, whatever became of it."""

    round: Count
    lo: Count
    hi: Count
