"""Layouts: each element of each tensor is in exactly one chunk, and where a tensor is cut is no matter of the servers."""

from __future__ import annotations

import itertools
import math
from unittest import mock

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roundtable.common.model.layout import CHUNK_BYTES, Layout, make_layout, message_batches, together
from roundtable.common.protocol.messages.gradients import Push
from roundtable.common.protocol.model_spec import Rule, TensorSpec
from roundtable.common.runtime.errors import UsageError

BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}

shapes = st.lists(st.integers(0, 40), max_size=3)
params = st.tuples(shapes, st.sampled_from(["float32", "float64", "bfloat16", "float16"]), st.integers(0, 2))
merged = st.tuples(shapes, st.sampled_from(sorted(BYTES)), st.just(-1), st.just("max"))
as_bytes = st.tuples(shapes, st.sampled_from(["complex128", "int16", "float8_e5m2", *BYTES]), st.just(-1), st.just("last"))
buffers = merged | as_bytes
#: Parameters of group 2 are updated whole.
models = st.lists(params | buffers, max_size=12).map(
    lambda items: [TensorSpec(f"t{n}", *item, whole=item[2] == 2) for n, item in enumerate(items)]
)
chunk_sizes = st.sampled_from([64, 1000, 64 << 10])


def layout_of(tensors: list[TensorSpec], servers: int, chunk_bytes: int = CHUNK_BYTES) -> Layout:
    """A layout with smaller chunks, for tensors that a test can afford."""
    with mock.patch("roundtable.common.model.layout.CHUNK_BYTES", chunk_bytes):
        return make_layout(tensors, servers)


@given(models, st.integers(1, 5), chunk_sizes)
# I6
def test_every_element_is_in_exactly_one_piece(tensors: list[TensorSpec], servers: int, chunk_bytes: int) -> None:
    found = [[0] * spec.units for spec in tensors]
    for chunk in layout_of(tensors, servers, chunk_bytes).chunks:
        for piece in chunk.pieces:
            for at in range(piece.start, piece.start + piece.length):
                found[piece.tensor][at] += 1
    assert all(times == 1 for spec in found for times in spec)


@given(models, st.integers(1, 5), chunk_sizes)
def test_a_tensor_that_is_updated_whole_is_on_one_server_and_alone_in_its_chunks(
    tensors: list[TensorSpec], servers: int, size: int
) -> None:
    layout = layout_of(tensors, servers, size)
    for some in together(layout.chunks):
        assert len({chunk.server for chunk in some}) == 1
        if some[0].whole:
            assert {piece.tensor for chunk in some for piece in chunk.pieces} == {some[0].pieces[0].tensor}
            assert sum(chunk.numel for chunk in some) == tensors[some[0].pieces[0].tensor].numel
        else:
            assert len(some) == 1
    assert {p.tensor for c in layout.chunks if c.whole for p in c.pieces} == {
        n for n, t in enumerate(tensors) if t.whole and t.numel
    }


@given(models, st.integers(1, 5), chunk_sizes)
def test_pieces_fill_their_chunk_without_gaps_and_are_of_one_kind(tensors: list[TensorSpec], servers: int, size: int) -> None:
    layout = layout_of(tensors, servers, size)
    assert [chunk.id for chunk in layout.chunks] == list(range(len(layout.chunks)))
    for chunk in layout.chunks:
        end = 0
        for piece in chunk.pieces:
            assert piece.length > 0 and piece.offset == end
            end += piece.length
            spec = tensors[piece.tensor]
            assert (spec.kind, spec.unit, spec.group) == (chunk.kind, chunk.dtype, chunk.group)
        assert chunk.numel == end
        assert chunk.weight_bytes == end * BYTES[chunk.dtype]
        assert chunk.sum_bytes == end * BYTES[chunk.sum_dtype] <= size


def test_gradients_of_half_precision_are_summed_in_float32() -> None:
    tensors = [TensorSpec(name, [4], name, 0) for name in ("float16", "bfloat16", "float32", "float64")]
    assert {c.dtype: c.sum_dtype for c in make_layout(tensors, 1).chunks} == {
        "float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "rule", "units"),
    [
        ("float16", "mean", 6),
        ("int64", "max", 6),
        ("int64", "last", 48),
        ("complex128", "last", 96),
        ("float8_e4m3fn", "last", 6),
    ],
)
def test_a_buffer_has_as_many_elements_in_chunks_as_it_has_bytes_if_it_travels_as_these(
    dtype: str, rule: Rule, units: int
) -> None:
    (chunk,) = make_layout([TensorSpec("b", [2, 3], dtype, -1, rule)], 1).chunks
    assert (chunk.kind, chunk.numel) == (rule, units)


@pytest.mark.parametrize(
    ("dtype", "rule"), [("int64", "mean"), ("bool", "mean"), ("complex64", "mean"), ("int8", "max"), ("bool", "sum")]
)
def test_a_rule_that_cannot_merge_a_buffer_is_refused(dtype: str, rule: Rule) -> None:
    with pytest.raises(UsageError, match=f"the buffer 'b' has dtype {dtype}, which rule '{rule}'"):
        make_layout([TensorSpec("b", [2], dtype, -1, rule)], 1)


@pytest.mark.parametrize("numel", [CHUNK_BYTES // 4 - 1, CHUNK_BYTES // 4, CHUNK_BYTES // 4 + 1, 3 * CHUNK_BYTES])
def test_a_large_tensor_is_cut_into_chunks_of_four_mebibytes(numel: int) -> None:
    chunks = make_layout([TensorSpec("w", [numel], "float32", 0)], 2).chunks
    assert len(chunks) == math.ceil(4 * numel / CHUNK_BYTES)
    assert all(chunk.sum_bytes == CHUNK_BYTES for chunk in chunks[:-1])
    assert 0 < chunks[-1].sum_bytes <= CHUNK_BYTES


def test_small_tensors_share_a_chunk_and_a_large_model_packs_more_of_them() -> None:
    small = [TensorSpec(f"s{n}", [1000], "float32", 0) for n in range(40)]
    assert [len(c.pieces) for c in make_layout(small, 1).chunks] == [16, 16, 8]  # 64 KiB hold 16
    large = [*small, TensorSpec("w", [1 << 20], "float32", 0)]
    assert sorted(len(c.pieces) for c in make_layout(large, 1).chunks) == [1, 40]


@given(models, st.integers(1, 6), st.integers(1, 6), chunk_sizes)
# I6
def test_the_cuts_do_not_depend_on_the_number_of_servers(tensors: list[TensorSpec], m: int, n: int, size: int) -> None:
    a, b = layout_of(tensors, m, size), layout_of(tensors, n, size)
    assert [c.pieces for c in a.chunks] == [c.pieces for c in b.chunks]


@given(models, st.integers(1, 5), chunk_sizes)
def test_chunks_lie_on_the_least_loaded_server_largest_first(tensors: list[TensorSpec], servers: int, size: int) -> None:
    tensors = [msgspec.structs.replace(spec, whole=False) for spec in tensors]  # those that are updated whole need more room
    layout = layout_of(tensors, servers, size)
    load = dict.fromkeys(range(servers), 0)
    for chunk in sorted(layout.chunks, key=lambda c: -c.sum_bytes):
        assert load[chunk.server] == min(load.values())
        load[chunk.server] += chunk.sum_bytes
    assert [chunk for server in range(servers) for chunk in layout.on(server)] == sorted(
        layout.chunks, key=lambda c: (c.server, c.id)
    )
    assert layout.owners() == sorted({0} | {server for server, load_ in load.items() if load_})


@given(models, models, st.integers(1, 5), st.integers(1, 5))
def test_digests_are_equal_exactly_where_layouts_are(a: list[TensorSpec], b: list[TensorSpec], m: int, n: int) -> None:
    first, second = make_layout(a, m), make_layout(b, n)
    assert (first.digest() == second.digest()) == (first == second)
    assert make_layout(a, m).digest() == first.digest()
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(a), type=list[TensorSpec])
    assert make_layout(sent, m).digest() == first.digest()


def test_the_digest_is_the_same_in_every_process_and_release() -> None:
    tensors = [TensorSpec("w", [3, 2], "float32", 0), TensorSpec("n", [], "int64", -1, "max")]
    assert make_layout(tensors, 2).digest().startswith("4b6339ac2ea22da7c6352409ae235e27")


@given(st.dictionaries(st.integers(0, 50), st.integers(1, 100)), st.integers(50, 150))
def test_messages_hold_all_ids_in_order_and_no_more_than_a_chunk_unless_one_is_larger(sizes: dict[int, int], size: int) -> None:
    with mock.patch("roundtable.common.model.layout.CHUNK_BYTES", size):
        batches = message_batches(sizes, sizes.__getitem__)
    assert [i for batch in batches for i in batch] == list(sizes)
    assert all(len(batch) == 1 or sum(sizes[i] for i in batch) <= size for batch in batches)
    for batch, after in itertools.pairwise(batches):  # none is cut short without need
        assert sum(sizes[i] for i in batch) + sizes[after[0]] > size


@pytest.mark.parametrize(("dtype", "group"), [("complex64", 0), ("float8_e4m3fn", 0), ("int64", 0), ("bits8", -1)])
def test_a_dtype_that_servers_cannot_keep_is_refused_by_name(dtype: str, group: int) -> None:
    with pytest.raises(UsageError, match=f"'layer.w' has dtype {dtype}"):
        make_layout([TensorSpec("layer.w", [2], dtype, group)], 1)


@settings(max_examples=20)
@given(st.integers(1, 3))
def test_a_model_of_nothing_has_no_chunks(servers: int) -> None:
    layout = make_layout([TensorSpec("empty", [0, 3], "float32", 0)], servers)
    assert layout.chunks == [] and layout.owners() == [0]


def test_which_pieces_of_a_chunk_are_there_always_fits_into_a_message() -> None:
    """A ResNet-50 has more buffers of one kind than a MessagePack integer has bits."""
    layout = make_layout([TensorSpec(f"norm{n}.running_mean", [64], "float32", -1, "mean") for n in range(161)], 2)
    assert [len(chunk.pieces) for chunk in layout.chunks] == [64, 64, 33]
    masks = [(1 << len(chunk.pieces)) - 1 for chunk in layout.chunks]
    push = Push(0, 0, 1, 1, 1, [0, 1, 2], masks)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(push), type=Push).present == masks
