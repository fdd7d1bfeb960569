"""Codecs on chunks: large weights are compressed, all else travels as it is."""

from __future__ import annotations

import contextlib
import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roundtable.common.codecs import CodecSettings, load
from roundtable.common.codecs.chunks import ChunkCodec, coded_runs
from roundtable.common.model.layout import Layout, make_layout
from roundtable.common.model.tensor_bytes import to_frame
from roundtable.common.protocol.model_spec import TensorSpec
from roundtable.common.runtime.errors import WireError

NAMES = ["none", "bf16", "fp16", "int8", "onebit", "topk"]

shapes = st.sampled_from([[40, 30], [32, 32], [31, 33], [5], [2000], [3, 4], [70, 2, 20]])
models = st.lists(
    st.tuples(shapes, st.sampled_from(["float32", "float32", "float64", "bfloat16"]), st.integers(-1, 1)), max_size=12
)


def layout_of(tensors: list[tuple[list[int], str, int]], chunk_bytes: int = 4 << 20, servers: int = 2) -> Layout:
    with mock.patch("roundtable.common.model.layout.CHUNK_BYTES", chunk_bytes):
        return make_layout([TensorSpec(f"t{n}", *spec) for n, spec in enumerate(tensors)], servers)


def weights(*shapes: list[int]) -> Layout:
    return layout_of([(shape, "float32", 0) for shape in shapes])


def normal(numel: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


@given(models, st.sampled_from([2048, 4096, 4 << 20]))
def test_runs_hold_exactly_the_elements_of_large_float32_weights(tensors: list[tuple[list[int], str, int]], size: int) -> None:
    layout = layout_of(tensors, size)
    for chunk in layout.chunks:
        runs = coded_runs(layout, chunk)
        inside = {at for start, length in runs for at in range(start, start + length)}
        for piece in chunk.pieces:
            shape, dtype, group = tensors[piece.tensor]
            large = len(shape) >= 2 and layout.tensors[piece.tensor].numel >= 1024 and dtype == "float32" and group >= 0
            assert inside.issuperset(range(piece.offset, piece.offset + piece.length)) if large else piece.offset not in inside
        assert len(inside) == sum(length for _, length in runs)
        for (start, length), (after, _) in itertools.pairwise(runs):
            assert start + length < after  # neighbours are joined


def test_neighbouring_weights_are_one_run_and_biases_part_runs() -> None:
    layout = weights([32, 32], [40, 30], [40], [31, 31], [50, 30])
    (chunk,) = layout.chunks
    assert coded_runs(layout, chunk) == [(0, 2224), (2224 + 40 + 961, 1500)]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_outside_the_runs_arrives_as_it_was_and_inside_as_the_codec_has_it(name: str) -> None:
    layout = weights([5], [32, 32], [40], [50, 30], [7])
    codec = load(name, CodecSettings(ratio=0.1))
    chunks = ChunkCodec(codec, layout)
    values = normal(layout.chunks[0].numel)
    values[2] = torch.nan  # where nothing is compressed, it travels too
    coded = chunks.encode(0, values, 3, None)
    assert coded is not None and coded.frame.dtype == torch.uint8 and coded.frame.is_contiguous()
    out = chunks.decode(0, memoryview(bytes(to_frame(coded.frame))), 3)
    inside = torch.cat([values[5 : 5 + 1024], values[5 + 1024 + 40 : -7]])
    alone = codec.encode(inside, 3, None)
    expected = values.clone()
    received = codec.decode(to_frame(alone.frame), inside.numel(), 3)
    expected[5 : 5 + 1024], expected[5 + 1024 + 40 : -7] = received[:1024], received[1024:]
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert (coded.state is None) == (alone.state is None)
    if coded.state is not None and alone.state is not None:
        assert torch.equal(coded.state["residual"], alone.state["residual"])


def test_a_chunk_that_is_one_run_is_given_to_the_codec_without_a_copy() -> None:
    layout = weights([64, 64])
    values = normal(4096)
    coded = ChunkCodec(load("none", CodecSettings()), layout).encode(0, values, 0, None)
    assert coded is not None and coded.frame.data_ptr() == values.data_ptr()


@pytest.mark.parametrize(
    "spec", [([2000], "float32", 0), ([50, 50], "float32", -1), ([50, 50], "float64", 0), ([9, 9], "float32", 0)]
)
def test_a_chunk_with_nothing_to_compress_is_sent_as_it_is(spec: tuple[list[int], str, int]) -> None:
    layout = layout_of([spec])
    chunks = ChunkCodec(load("int8", CodecSettings()), layout)
    assert chunks.encode(0, normal(layout.chunks[0].numel), 0, None) is None
    for chunk in (0, 1, -1):
        with pytest.raises(WireError, match=f"chunk {chunk} is not one that is compressed"):
            chunks.decode(chunk, memoryview(bytes(4000)), 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e31, -3e38])
def test_values_that_no_codec_can_add_up_are_sent_as_they_are_and_touch_no_state(name: str, bad: float) -> None:
    layout = weights([40], [50, 30])
    values, state = normal(1540), {"residual": normal(1500, 1)}
    values[777] = bad
    assert ChunkCodec(load(name, CodecSettings()), layout).encode(0, values, 0, state) is None
    assert torch.equal(state["residual"], normal(1500, 1))


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_values_that_are_compressed_leave_all_finite(name: str) -> None:
    layout = weights([40, 100])
    coded = ChunkCodec(load(name, CodecSettings()), layout).encode(0, torch.full((4000,), 1e30), 0, None)
    assert coded is not None
    assert load(name, CodecSettings()).decode(to_frame(coded.frame), 4000, 0).isfinite().all()
    assert coded.state is None or coded.state["residual"].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(frame=st.binary(max_size=3000))
def test_garbage_is_a_wire_error(name: str, frame: bytes) -> None:
    chunks = ChunkCodec(load(name, CodecSettings()), weights([40], [32, 32]))
    with contextlib.suppress(WireError):
        assert chunks.decode(0, memoryview(frame), 0).shape == (1064,)
