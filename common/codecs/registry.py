"""The codecs that a run's settings choose, and their seeds: the same on workers and servers.

Weights are the same on all workers under every codec. What is pushed is a function of the sum and of the micro-batches it is
over under bf16, fp16 and int8, so that only how these were divided among workers tells on the result; with error feedback
(onebit, topk) it also matters what each worker has left out before. Where a sum takes the place of parts of it that
had come from others, or `backup` leaves a contribution out, what those carried of earlier rounds is lost with them.
"""

from __future__ import annotations

from roundtable.common.codecs import CodecSettings, load
from roundtable.common.codecs.chunks import ChunkCodec
from roundtable.common.codecs.int8 import Int8
from roundtable.common.config.batch_plan import derive_seed
from roundtable.common.config.settings import Settings
from roundtable.common.model.layout import Layout

#: Seed for weights: nothing in their codecs is random, so that all workers hold the same.
WEIGHT_SEED = 0


def for_pushes(settings: Settings, layout: Layout) -> ChunkCodec | None:
    """The codec of what workers send, None for none."""
    if settings.compress_gradients == "none":
        return None
    return ChunkCodec(load(settings.compress_gradients, CodecSettings(settings.topk_ratio)), layout)


def push_seed(settings: Settings, round_: int, lo: int, hi: int, chunk: int) -> int:
    """The seed of a chunk's frame in the push of micro-batches lo..hi-1, whoever sends it."""
    return derive_seed(settings.seed, "codec", round_, lo, hi, chunk)


def for_weights(settings: Settings, layout: Layout) -> ChunkCodec | None:
    """The codec of weights, or where `sends_changes` of how they change; None for none."""
    if settings.compress_weights == "none":
        return None
    if settings.compress_weights == "int8":
        return ChunkCodec(Int8(CodecSettings(), stochastic=False), layout)
    return ChunkCodec(load(settings.compress_weights, CodecSettings()), layout)


def sends_changes(settings: Settings) -> bool:
    """Whether weights are sent as changes of what all workers hold, V(t+1) = V(t) + decode(encode(W(t+1) - V(t))).

    What a frame leaves out is part of the next difference: that is error feedback, and V stays close to W.
    """
    return settings.compress_weights in ("int8", "onebit")
