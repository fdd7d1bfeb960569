"""The codecs that a run's settings choose, and their seeds. They are the same on workers and servers.

Under every codec, all workers have the same weights. With bf16, fp16 and int8, a push depends on its sum and its micro-batches
alone. So only the division of micro-batches among workers affects the result. With error feedback (onebit, topk), each worker's
residuals affect it too. If a sum replaces parts that came from others, or `backup` leaves out a contribution, the residuals in
these are lost.
"""

from __future__ import annotations

from roundtable.common.codecs import CodecSettings, load
from roundtable.common.codecs.chunks import ChunkCodec
from roundtable.common.codecs.int8 import Int8
from roundtable.common.config.batch_plan import derive_seed
from roundtable.common.config.settings import Settings
from roundtable.common.model.layout import Layout

#: Seed for weights. Their codecs have no random choices, so that all workers have the same weights.
WEIGHT_SEED = 0


def for_pushes(settings: Settings, layout: Layout) -> ChunkCodec | None:
    """Return the codec of pushes, or None if there is none."""
    if settings.compress_gradients == "none":
        return None
    return ChunkCodec(load(settings.compress_gradients, CodecSettings(settings.topk_ratio)), layout)


def push_seed(settings: Settings, round_: int, lo: int, hi: int, chunk: int) -> int:
    """Return the seed of a chunk's frame in the push of micro-batches lo..hi-1. It is the same on every worker."""
    return derive_seed(settings.seed, "codec", round_, lo, hi, chunk)


def for_weights(settings: Settings, layout: Layout) -> ChunkCodec | None:
    """Return the codec of weights, or of their changes if `sends_changes`. Return None if there is none."""
    if settings.compress_weights == "none":
        return None
    if settings.compress_weights == "int8":
        return ChunkCodec(Int8(CodecSettings(), stochastic=False), layout)
    return ChunkCodec(load(settings.compress_weights, CodecSettings()), layout)


def sends_changes(settings: Settings) -> bool:
    """Return whether weights are sent as changes of the workers' weights, V(t+1) = V(t) + decode(encode(W(t+1) - V(t))).

    The residual of a frame is part of the next difference. This is error feedback, and it keeps V close to W.
    """
    return settings.compress_weights in ("int8", "onebit")
