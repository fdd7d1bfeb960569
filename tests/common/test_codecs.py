"""Codecs: what comes out is near what went in, what is left out is not lost, and the same inputs give the same bytes."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roundtable.common.codecs import Codec, CodecSettings, Coded, State, load
from roundtable.common.codecs.blocks import SPAN, spans
from roundtable.common.codecs.int8 import Int8
from roundtable.common.model.tensor_bytes import to_frame
from roundtable.common.runtime.errors import WireError

STATELESS = ["none", "bf16", "fp16", "int8"]
WITH_FEEDBACK = ["onebit", "topk"]
NAMES = STATELESS + WITH_FEEDBACK
SIZES = [1, 7, 255, 256, 257, 1023, 1024, 1025, 5000]
RATIO = CodecSettings(ratio=0.1)

names = pytest.mark.parametrize("name", NAMES)


def normal(numel: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def decoded(codec: Codec, coded: Coded, numel: int, seed: int = 0) -> torch.Tensor:
    """Return the values that a receiver reads from the bytes alone."""
    return codec.decode(memoryview(bytes(to_frame(coded.frame))), numel, seed)


def there_and_back(codec: Codec, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return decoded(codec, codec.encode(values, seed, None), values.numel(), seed)


def means(values: torch.Tensor, block: int) -> torch.Tensor:
    """Each element's block's mean magnitude."""
    return torch.cat([part.abs().mean().expand(len(part)) for part in values.split(block)])


def steps(values: torch.Tensor) -> torch.Tensor:
    """Each element's block's int8 step."""
    return torch.cat([(part.abs().max() / 127).expand(len(part)) for part in values.split(256)])


@names
@pytest.mark.parametrize("numel", SIZES)
def test_frames_are_flat_bytes_and_decode_to_writable_values_of_their_own(name: str, numel: int) -> None:
    codec = load(name, RATIO)
    coded = codec.encode(normal(numel), 3, None)
    assert coded.frame.dtype == torch.uint8 and coded.frame.dim() == 1 and coded.frame.is_contiguous()
    assert (coded.state is not None) == bool(codec.states) == (name in WITH_FEEDBACK)
    sent = bytes(to_frame(coded.frame))
    values = codec.decode(memoryview(sent), numel, 3)
    assert values.dtype == torch.float32 and values.shape == (numel,) and values.is_contiguous()
    values.fill_(7.0)
    assert sent == bytes(to_frame(coded.frame))


@names
@pytest.mark.parametrize("numel", [1, 1025, SPAN + 257])
def test_the_same_inputs_give_the_same_bytes_and_are_not_written_to(name: str, numel: int) -> None:
    values, given_ = normal(numel), normal(numel)
    codec = load(name, RATIO)
    state: State | None = {"residual": normal(numel, 1)} if codec.states else None
    one = codec.encode(values, 5, state)
    two = load(name, RATIO).encode(values, 5, state)
    assert torch.equal(one.frame, two.frame)
    assert torch.equal(values, given_)
    if state is not None:
        assert one.state is not None and two.state is not None
        assert torch.equal(one.state["residual"], two.state["residual"])
        assert torch.equal(state["residual"], normal(numel, 1))


@names
@pytest.mark.parametrize("numel", SIZES)
def test_zeros_stay_zeros(name: str, numel: int) -> None:
    assert not there_and_back(load(name, RATIO), torch.zeros(numel)).any()


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize(("name", "error"), [("none", 0.0), ("bf16", 2.0**-8), ("fp16", 2.0**-11)])
def test_casts_are_off_by_no_more_than_they_say(name: str, error: float, numel: int) -> None:
    values = normal(numel)
    off = (there_and_back(load(name, RATIO), values) - values).abs()
    assert (off <= error * values.abs() + 2.0**-25).all()


@pytest.mark.parametrize(("name", "largest"), [("fp16", 65504.0), ("bf16", torch.finfo(torch.bfloat16).max)])
def test_what_a_format_cannot_hold_becomes_its_largest_number(name: str, largest: float) -> None:
    values = torch.tensor([3.4e38, -3.4e38, 1.0])
    assert there_and_back(load(name, RATIO), values).tolist() == [largest, -largest, 1.0]


@pytest.mark.parametrize("numel", [*SIZES, SPAN + 300])
@pytest.mark.parametrize(("stochastic", "error"), [(True, 1.0), (False, 0.5)])
def test_int8_is_within_a_step_or_half_a_step_if_rounded_to_nearest(stochastic: bool, error: float, numel: int) -> None:
    values = normal(numel)
    values[::300] *= 1000  # blocks of different scale
    off = (there_and_back(Int8(RATIO, stochastic), values, 9) - values).abs()
    assert (off <= (error + 1e-4) * steps(values)).all()


@settings(max_examples=70)
@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=300), st.integers(0, 1 << 64), st.booleans())
def test_int8_is_within_a_step_whatever_the_values(elements: list[float], seed: int, stochastic: bool) -> None:
    values = torch.tensor(elements)
    off = (there_and_back(Int8(RATIO, stochastic), values, seed) - values).abs()
    assert (off <= (1.0 + 1e-4) * steps(values) + 1e-30).all()


def test_int8_is_right_in_the_mean_over_seeds() -> None:
    values, rounds = normal(600), 4000
    codec = Int8(CodecSettings())
    total = torch.zeros(600, dtype=torch.float64)
    for seed in range(rounds):
        total += there_and_back(codec, values, seed)
    off = (total / rounds - values) / steps(values)
    assert off.abs().max() < 5 * 0.5 / math.sqrt(rounds)  # five standard deviations of the mean


def test_int8_reads_each_random_number_once_over_all_places_of_the_table() -> None:
    table = Int8(CodecSettings())._uniform
    period = 1 << 16
    expected = (torch.arange(period, dtype=torch.float64) + 0.5) / period
    for element in (0, 1, 77, SPAN - 1):  # what an element meets, place after place
        assert torch.equal(table[element : element + period].double().sort().values, expected)


def test_int8_rounded_to_nearest_does_not_depend_on_the_seed() -> None:
    codec = Int8(CodecSettings(), stochastic=False)
    assert torch.equal(codec.encode(normal(5000), 1, None).frame, codec.encode(normal(5000), 2, None).frame)
    assert not torch.equal(*(Int8(CodecSettings()).encode(normal(5000), seed, None).frame for seed in (1, 2)))


@pytest.mark.parametrize("numel", [*SIZES, SPAN + 1027])
def test_onebit_gives_signs_times_the_mean_magnitude_of_the_block(numel: int) -> None:
    values = normal(numel)
    assert torch.equal(there_and_back(load("onebit", RATIO), values), torch.copysign(means(values, 1024), values))


@settings(max_examples=40)
@given(
    st.sampled_from([1, 100, 4095, 4096, 20_000]),
    st.floats(0.0001, 1.0),
    st.sampled_from(["normal", "ties", "zeros", "periodic", "ascending", "heavy"]),
    st.integers(0, 1000),
)
def test_topk_sends_the_largest_whatever_the_sample_says(numel: int, ratio: float, shape: str, seed: int) -> None:
    values = normal(numel, seed)
    if shape == "ties":
        values = values.round()
    elif shape == "zeros":
        values *= torch.rand(numel) < 0.001
    elif shape == "periodic":  # the sample sees nothing but the largest
        values[::61] *= 1000
    elif shape == "ascending":
        values = values.sort().values
    elif shape == "heavy":
        values = values**7
    sent = there_and_back(load("topk", CodecSettings(ratio=ratio)), values)
    count = min(numel, max(1, round(ratio * numel)))
    order = values.abs().sort(descending=True, stable=True).indices[:count]  # of equal ones the first
    expected = torch.zeros(numel)
    expected[order] = values[order]
    assert torch.equal(sent, expected)
    assert torch.equal(sent.abs().topk(count).values, values.abs().topk(count).values)


@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.03, 0.0313, 0.04, 0.2, 1.0])
def test_topk_gives_positions_as_a_bitmap_or_as_numbers_whichever_is_smaller(ratio: float) -> None:
    numel, count = 10_000, round(ratio * 10_000)
    frame = load("topk", CodecSettings(ratio=ratio)).encode(normal(numel), 0, None).frame
    assert len(frame) == 1 + min(numel // 8, 4 * count) + 4 * count


@pytest.mark.parametrize("numel", [1, 257, 1025])
@pytest.mark.parametrize("name", WITH_FEEDBACK)
def test_what_was_decoded_and_what_is_left_add_up_to_what_was_given(name: str, numel: int) -> None:
    codec, state = load(name, RATIO), None
    given_, received = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64)
    for seed in range(50):
        values = normal(numel, seed)
        coded = codec.encode(values, seed, state)
        given_ += values
        received += decoded(codec, coded, numel, seed)
        state = coded.state
        assert state is not None
        torch.testing.assert_close(received + state["residual"], given_, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", WITH_FEEDBACK)
def test_the_residual_is_what_was_to_be_sent_less_what_arrives(name: str) -> None:
    codec, values, residual = load(name, RATIO), normal(3000), normal(3000, 1)
    coded = codec.encode(values, 4, {"residual": residual})
    assert coded.state is not None
    assert torch.equal(coded.state["residual"], values + residual - decoded(codec, coded, 3000, 4))


@names
@settings(max_examples=50)
@given(frame=st.binary(max_size=300), numel=st.integers(1, 80))
def test_garbage_is_a_wire_error_or_values(name: str, frame: bytes, numel: int) -> None:
    with contextlib.suppress(WireError):
        assert load(name, RATIO).decode(memoryview(frame), numel, 0).shape == (numel,)


@names
@pytest.mark.parametrize("numel", [1, 257, 1025])
def test_frames_that_are_too_short_or_too_long_are_refused(name: str, numel: int) -> None:
    codec = load(name, RATIO)
    good = bytes(to_frame(codec.encode(normal(numel), 0, None).frame))
    for bad in (b"", good[:-1], good[1:], good + b"\0", good + good):
        with pytest.raises(WireError):
            codec.decode(memoryview(bad), numel, 0)


@pytest.mark.parametrize("name", ["int8", "onebit"])
@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_scales_that_are_not_finite_are_refused(name: str, scale: float) -> None:
    frame = bytearray(bytes(to_frame(load(name, RATIO).encode(normal(2000), 0, None).frame)))
    frame[4:8] = np.float32(scale).tobytes()
    with pytest.raises(WireError, match="not finite"):
        load(name, RATIO).decode(memoryview(frame), 2000, 0)


@pytest.mark.parametrize(
    "where",
    [
        np.array([3, 50], np.uint32).tobytes(),  # beyond the last
        np.array([3, 3], np.uint32).tobytes(),
        np.array([4, 3], np.uint32).tobytes(),
        np.array([4, 2**32 - 1], np.uint32).tobytes(),
    ],
)
def test_topk_refuses_positions_that_are_no_ascending_ones_of_the_chunk(where: bytes) -> None:
    codec = load("topk", CodecSettings(ratio=0.04))  # 2 of 50
    with pytest.raises(WireError, match="2 positions among 50"):
        codec.decode(memoryview(b"\1" + where + bytes(8)), 50, 0)


@pytest.mark.parametrize("bits", [[], [1], [1, 2, 3], [1, 51]])
def test_topk_refuses_a_bitmap_of_another_number_of_positions(bits: list[int]) -> None:
    mask = np.zeros(56, bool)
    mask[bits] = True
    codec = load("topk", CodecSettings(ratio=0.04))
    with pytest.raises(WireError, match="2 positions among 50"):
        codec.decode(memoryview(b"\0" + np.packbits(mask).tobytes() + bytes(8)), 50, 0)
    with pytest.raises(WireError):
        codec.decode(memoryview(b"\2" + np.packbits(mask).tobytes() + bytes(8)), 50, 0)


@names
def test_least_squares_is_solved_through_every_codec(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(200, 60, generator=generator) / math.sqrt(200)
    solution = torch.randn(60, generator=generator)
    codec, state, x = load(name, CodecSettings(ratio=0.1)), None, torch.zeros(60)
    for seed in range(1500):
        coded = codec.encode(a.T @ (a @ (x - solution)), seed, state)
        state = coded.state
        x -= 0.03 * decoded(codec, coded, 60, seed)
    assert (x - solution).norm() < 0.02 * solution.norm()


@pytest.mark.parametrize("codec", [Int8(CodecSettings(), stochastic=False), load("onebit", CodecSettings())])
def test_a_receiver_that_adds_up_coded_differences_follows_what_moves_and_stops(codec: Codec) -> None:
    target, copy = torch.zeros(2000), torch.zeros(2000)
    for seed in range(100):
        if seed < 50:
            target += 0.01 * normal(2000, seed)
        copy += decoded(codec, codec.encode(target - copy, seed, None), 2000, seed)
    assert (target - copy).norm() < 0.02 * target.norm()


@given(st.integers(0, 5 * SPAN), st.sampled_from([1, 256, 1024]))
def test_spans_cover_every_element_once_in_whole_blocks(numel: int, block: int) -> None:
    end = row = 0
    for span in spans(numel, block):
        assert (span.start, span.first) == (end, row) and 0 < span.length <= SPAN
        assert span.start == span.first * block and span.stop == min(numel, span.last * block)
        end, row = span.stop, span.last
    assert end == numel and row == -(-numel // block)
