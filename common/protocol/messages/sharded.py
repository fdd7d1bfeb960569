"""Messages of layers that servers compute. common/model/sparse_rows.py says how their frames are cut."""

from __future__ import annotations

import msgspec

from roundtable.common.config.field_types import Amount, Count, CountOrNone, Hypers, Many
from roundtable.common.config.weights import Weighed
from roundtable.common.protocol.messages.base import Body


class ShardedForward(Body, frozen=True):
    """Compute your part of sharded layer `layer` for `count` samples, as the layer is when round `version` begins.

    The samples' features (count, dim) follow, float32, and unless `top` is set their labels, int64. If the server has not kept
    the version, it refuses what is for training (`keeps`), and answers all else from the newest one. If each push is applied at
    once, it answers everything from the newest one.

    For a hidden layer, the worker wants its outputs, and only features follow. With `back_through`, the worker wants the
    gradient of its loss by the features: the gradient by this server's outputs follows, (count, rows).
    """

    number: Count
    layer: Count
    version: Count
    count: Count = 0
    keeps: bool = False
    #: Rows count as if of length 1.
    normalised: bool = False
    #: The sum of all rows is wanted too.
    sums: bool = False
    #: So many best classes of each sample are wanted.
    top: Count = 0
    #: The number of the question whose outputs the gradient is of, or -1.
    back_through: CountOrNone = -1
    #: The features follow the gradient, because a replaced server may not know them.
    with_features: bool = False


class ShardedForwardReply(Body, frozen=True):
    """The answer to ShardedForward `number`.

    For training, the server computes over its classes without a sample's own, with z a logit. Three results follow for each
    sample: the largest z, the sum of exp(z - largest), and the sum of exp(z - largest) x row. If `sums` was set, the sum of all
    rows follows. Then come the rows of the labels that are here, in the order of the samples.

    With `top`, the best logits of each sample follow, and their classes, int64. For a hidden layer, this server's outputs
    (count, rows) follow, or its part of the features' gradient (count, D).
    """

    number: Count
    #: The server has not kept the version. Nothing follows.
    gone: bool = False


class LayerUse(msgspec.Struct, frozen=True, array_like=True):
    """A micro-batch's contribution through its question `number`, of `count` samples.

    The logit of every class except a sample's own has the gradient (p - smoothing) x g. For a hidden layer, the question is the
    one about the features' gradient.
    """

    number: Count
    count: Count
    smoothing: float = 0.0
    #: For a hidden layer: the factor on the gradient by its outputs.
    scale: float = 1.0


class LayerPush(Weighed, Body, frozen=True):
    """The contribution of micro-batches lo..hi-1 of `round` to sharded layers, in order of the micro-batches.

    For each of `uses`, three results follow for every sample. The first is the logarithm of the sum of all exp(z). The second, g,
    is the gradient of its loss x weight. The third is the gradient of its own class's logit, already multiplied by g.
    `base_version`, `finite` and `weight` are as in Push.
    """

    round: Count
    lo: Count
    hi: Count
    samples: Count
    uses: Many[LayerUse]
    hypers: Many[Hypers] = []
    base_version: Count = 0
    finite: bool = True
    #: Questions that a replaced server may not know. Their features and labels come first.
    questions: Many[ShardedForward] = []
    weight: Amount | None = None


class LayerAck(Body, frozen=True):
    """This LayerPush need not be sent again."""

    round: Count
    lo: Count
    hi: Count
