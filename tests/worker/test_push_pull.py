"""Contributions and weights in frames of a codec: what is sent again is the same, and what did not count is not forgotten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from msgspec.structs import replace

from roundtable.common.codecs import CodecSettings, load
from roundtable.common.codecs.registry import for_pushes, for_weights, push_seed
from roundtable.common.config.settings import Settings
from roundtable.common.model.layout import Layout, make_layout
from roundtable.common.model.partial_sum import Sum
from roundtable.common.model.tensor_bytes import from_frame, to_frame
from roundtable.common.protocol.effects import Send
from roundtable.common.protocol.messages.gradients import Ack, Pull, Push, VersionExpired, Weights
from roundtable.common.protocol.model_spec import TensorSpec
from roundtable.common.protocol.transport import SEND_AGAIN_S
from roundtable.common.runtime.errors import WireError
from roundtable.worker.client.push_pull import ParameterClient
from roundtable.worker.replica.gradient_buffers import GradientBuffer, GradientBuffers
from roundtable.worker.replica.mapped_weights import InWeightBuffer

ROWS, COLUMNS = 40, 30
NUMEL = ROWS * COLUMNS
PUSH = Push(3, 0, 2, 8, 2, [], [])


def layout_of() -> Layout:
    """Chunk 0 is compressed; chunk 1, of another group, is not."""
    return make_layout([TensorSpec("weight", [ROWS, COLUMNS], "float32", 0), TensorSpec("bias", [5], "float32", 1)], 1)


class Worker:
    def __init__(self, near: tuple[int, ...] = (), **settings: Any) -> None:
        self.layout = layout_of()
        self.settings = Settings(**settings)
        self.client = ParameterClient(self.layout, self.settings, pulls_follow=False, near=near)
        self.gradient_buffers = GradientBuffers(self.layout, shared=False)

    def gradient_buffer(self, value: float | torch.Tensor) -> GradientBuffer:
        gradient_buffer = self.gradient_buffers.take(self.client.needs)
        gradient_buffer.chunks[0][:] = value
        gradient_buffer.chunks[1][:] = 1.0
        return gradient_buffer

    def push(
        self,
        gradient_buffer: GradientBuffer,
        push: Push = PUSH,
        now: float = 0.0,
        scale: float = 1.0,
        chunks: tuple[int, ...] = (0, 1),
    ) -> Send:
        sums = {chunk: Sum(gradient_buffer.chunks[chunk], 1, scale=scale) for chunk in chunks}
        (message,) = self.client.push(push, sums, now, gradient_buffer=gradient_buffer)
        gradient_buffer.taken = False
        return message

    def ack(self, push: Push, ignored: list[int], early: bool = False) -> None:
        self.client.handle("server-0", Ack(push.round, push.lo, push.hi, push.chunks, tentative=early, ignored=ignored), ())

    def sent(self, message: Send) -> torch.Tensor:
        """Chunk 0 of a push as a server decodes it."""
        codec = for_pushes(self.settings, self.layout)
        assert codec is not None and isinstance(message.body, Push)
        push = message.body
        seed = push_seed(self.settings, push.round, push.lo, push.hi, 0)
        return codec.decode(0, memoryview(message.frames[push.chunks.index(0)]), seed)


def whole(message: Send) -> Push:
    assert isinstance(message.body, Push)
    return message.body


# ---- pushes


def test_a_push_tells_which_of_its_chunks_are_coded_and_takes_the_scale_with_it() -> None:
    worker = Worker(compress_gradients="bf16")
    message = worker.push(worker.gradient_buffer(0.75), scale=4.0)
    assert (whole(message).chunks, whole(message).coded) == ([0, 1], [0])
    assert [frame.nbytes for frame in message.frames] == [2 * NUMEL, 20]
    assert torch.equal(worker.sent(message), torch.full((NUMEL,), 3.0))
    assert whole(message).scale == 4.0  # of the chunk that is not coded


@pytest.mark.parametrize("codec", ["int8", "topk", "onebit"])
# I12
def test_what_is_sent_again_has_the_same_bytes_though_the_gradient_buffer_holds_something_else(codec: str) -> None:
    worker = Worker(compress_gradients=codec)
    gradient_buffer = worker.gradient_buffer(torch.randn(NUMEL))
    message = worker.push(gradient_buffer, chunks=(0,))
    before = [bytes(frame) for frame in message.frames]
    assert not worker.client.needs(gradient_buffer)
    gradient_buffer.chunks[0].zero_()
    (again,) = worker.client.tick(SEND_AGAIN_S + 1)
    assert again.body == message.body and [bytes(frame) for frame in again.frames] == before


@pytest.mark.parametrize("codec", ["none", "topk", "onebit"])
def test_what_is_computed_again_before_it_is_acknowledged_is_not_sent_anew(codec: str) -> None:
    worker = Worker(compress_gradients=codec)
    first = worker.push(worker.gradient_buffer(torch.randn(NUMEL)), replace(PUSH, metrics={"loss": (1.0, 8.0)}))
    before = [bytes(frame) for frame in first.frames]
    again = worker.gradient_buffer(torch.randn(NUMEL))
    sums = {chunk: Sum(again.chunks[chunk], 1) for chunk in (0, 1)}
    assert worker.client.push(replace(PUSH, metrics={"loss": (2.0, 8.0)}), sums, 0.1, gradient_buffer=again) == []
    assert worker.client.push_early(PUSH, 0, sums[0], 0.1, {}, again) == []
    assert not worker.client.needs(again)
    (retry,) = worker.client.tick(SEND_AGAIN_S + 1)
    assert retry.body == first.body and [bytes(frame) for frame in retry.frames] == before
    worker.client.handle("server-0", Ack(PUSH.round, PUSH.lo, PUSH.hi, [0, 1], metrics=True), ())
    assert worker.client.unacknowledged(PUSH.round) == []
    assert whole(worker.push(again)).chunks == [0, 1]  # that is another matter once it is over


# I14
def test_a_gradient_buffer_is_needed_as_long_as_something_in_it_is_sent_as_it_is() -> None:
    worker = Worker(compress_gradients="topk")
    gradient_buffer = worker.gradient_buffer(1.0)
    message = worker.push(gradient_buffer)
    assert worker.client.needs(gradient_buffer)
    worker.ack(whole(message), [])
    assert not worker.client.needs(gradient_buffer)


def test_two_workers_send_the_same_bytes_for_the_same_sum() -> None:
    values = torch.randn(NUMEL)
    workers = [Worker(compress_gradients="int8") for _ in range(2)]
    first, second = ([bytes(frame) for frame in worker.push(worker.gradient_buffer(values)).frames] for worker in workers)
    assert first == second


def test_gradients_that_are_not_finite_are_sent_as_they_are() -> None:
    worker = Worker(compress_gradients="topk")
    values = torch.randn(NUMEL)
    values[7] = float("inf")
    message = worker.push(worker.gradient_buffer(values))
    assert whole(message).coded == [] and torch.equal(from_frame(message.frames[0], "float32", NUMEL, ""), values)


def test_what_waits_of_a_parameter_is_not_sent_along_while_it_has_no_gradient() -> None:
    worker = Worker(compress_gradients="topk", topk_ratio=0.5)
    values = torch.arange(1.0, NUMEL + 1)
    first = worker.push(worker.gradient_buffer(values))
    worker.ack(whole(first), [])
    gradient_buffer = worker.gradient_buffer(0.0)
    (absent,) = worker.client.push(
        Push(4, 0, 2, 8, 2, [], []), {0: Sum(gradient_buffer.chunks[0], 0)}, 0.0, gradient_buffer=gradient_buffer
    )
    assert whole(absent).coded == []
    worker.ack(whole(absent), [])
    third = worker.push(worker.gradient_buffer(0.0), Push(5, 0, 2, 8, 2, [], []))
    assert torch.equal(worker.sent(third), values - worker.sent(first))


def test_what_servers_read_from_shared_memory_is_not_encoded() -> None:
    worker = Worker(compress_gradients="topk")
    worker.client.peers.readers.add(0)
    gradient_buffer = worker.gradient_buffer(1.0)
    gradient_buffer.index = 0
    message = worker.push(gradient_buffer)
    assert not message.frames and whole(message).gradient_buffer == 0 and not whole(message).coded
    assert worker.client.traffic.pushed_bytes == 0


@pytest.mark.parametrize("ignored", [[], [0], [0, 1]])
def test_what_a_frame_left_out_is_sent_later_if_the_frame_counted_and_not_otherwise(ignored: list[int]) -> None:
    worker = Worker(compress_gradients="topk", topk_ratio=0.5)
    values = torch.arange(1.0, NUMEL + 1)
    first = worker.push(worker.gradient_buffer(values))
    worker.ack(whole(first), ignored)
    second = worker.push(worker.gradient_buffer(0.0), Push(4, 0, 2, 8, 2, [], []))
    left_out = values - worker.sent(first)
    assert torch.equal(worker.sent(second), left_out if 0 not in ignored else torch.zeros(NUMEL))


def test_what_is_computed_again_after_it_has_counted_neither_sends_nor_leaves_anything() -> None:
    worker = Worker(compress_gradients="topk", topk_ratio=0.5)
    values = torch.arange(1.0, NUMEL + 1)
    first = worker.push(worker.gradient_buffer(values))
    worker.ack(whole(first), [])
    again = worker.push(worker.gradient_buffer(values))  # nobody knew, and the server says of both what became of the first
    worker.ack(whole(again), [])
    third = worker.push(worker.gradient_buffer(0.0), Push(4, 0, 2, 8, 2, [], []))
    assert torch.equal(worker.sent(third), values - worker.sent(first))


def test_the_second_of_two_sums_under_way_has_nothing_of_what_the_first_carries() -> None:
    worker = Worker(compress_gradients="topk", topk_ratio=0.5)
    values = torch.arange(1.0, NUMEL + 1)
    first = worker.push(worker.gradient_buffer(values), Push(3, 0, 2, 8, 2, [], []))
    worker.ack(whole(first), [])
    second = worker.push(worker.gradient_buffer(0.0), Push(4, 0, 2, 8, 2, [], []))
    third = worker.push(worker.gradient_buffer(0.0), Push(4, 2, 3, 4, 1, [], []))
    assert worker.sent(second).any() and not worker.sent(third).any()
    worker.ack(whole(third), [])
    worker.ack(whole(second), [0])
    fourth = worker.push(worker.gradient_buffer(0.0), Push(5, 0, 2, 8, 2, [], []))
    assert torch.equal(worker.sent(fourth), worker.sent(second))


def test_an_early_push_that_does_not_count_is_as_if_it_had_never_been_sent() -> None:
    workers = [Worker(compress_gradients="topk", topk_ratio=0.1) for _ in range(2)]
    values = torch.randn(NUMEL)
    for worker in workers:
        worker.ack(whole(worker.push(worker.gradient_buffer(values))), [])
    later = Push(4, 0, 2, 8, 2, [], [])
    early = workers[0]
    gradient_buffer = early.gradient_buffer(values)
    (message,) = early.client.push_early(later, 0, Sum(gradient_buffer.chunks[0], 1), 0.0, {}, gradient_buffer)
    early.ack(whole(message), [], early=True)
    gradient_buffer.chunks[0][:] = -values
    assert early.client.confirm((), 0.0) == []
    sent = [w.push(w.gradient_buffer(-values), later, chunks=(0,)) for w in workers]
    assert bytes(sent[0].frames[0]) == bytes(sent[1].frames[0])


def test_an_early_push_that_is_confirmed_commits_what_it_left_out() -> None:
    worker = Worker(compress_gradients="topk", topk_ratio=0.5)
    values = torch.arange(1.0, NUMEL + 1)
    gradient_buffer = worker.gradient_buffer(values)
    (message,) = worker.client.push_early(PUSH, 0, Sum(gradient_buffer.chunks[0], 1), 0.0, {}, gradient_buffer)
    assert not worker.client.needs(gradient_buffer)
    (confirm,) = worker.client.confirm({0}, 0.0)
    assert whole(confirm).stage == "commit" and whole(confirm).coded == [0] and not confirm.frames
    worker.ack(whole(confirm), [])
    second = worker.push(worker.gradient_buffer(0.0), Push(4, 0, 2, 8, 2, [], []))
    assert torch.equal(worker.sent(second), values - worker.sent(message))


# ---- weights


def pulled(worker: Worker, for_round: int, frame: Any, coded: bool, weight_buffer: int = -1) -> Pull:
    """Pull round `clock`, of which the server hands out `frame` for chunk 0; the Pull that it got."""
    (ask,) = worker.client.pull(for_round, False, 0.0)
    frames = [] if weight_buffer >= 0 else [frame, to_frame(torch.zeros(5))]
    worker.client.handle("server-0", Weights(for_round, for_round, [0, 1], True, weight_buffer, [0] if coded else []), frames)
    assert isinstance(ask.body, Pull)
    return ask.body


def taken(worker: Worker) -> torch.Tensor:
    return from_frame(worker.client.take()[0][0], "float32", NUMEL, "")


def test_rounded_weights_come_out_as_single_precision() -> None:
    worker = Worker(compress_weights="bf16")
    values = torch.randn(NUMEL).bfloat16()
    pulled(worker, 0, to_frame(values), coded=True)
    assert torch.equal(taken(worker), values.float())
    assert worker.client.traffic.pulled_bytes == 2 * NUMEL + 20


def test_changes_are_added_to_what_came_before_whatever_a_script_writes_into_its_model() -> None:
    worker = Worker(compress_weights="int8")
    codec = for_weights(worker.settings, worker.layout)
    assert codec is not None
    weights, change = torch.randn(NUMEL), torch.randn(NUMEL)
    assert pulled(worker, 0, to_frame(weights), coded=False).held_version == -1
    model = taken(worker).clone()
    model.zero_()
    coded = codec.encode(0, change, 0, None)
    assert coded is not None
    assert pulled(worker, 1, to_frame(coded.frame), coded=True).held_version == 0
    assert torch.equal(taken(worker), weights + codec.decode(0, memoryview(to_frame(coded.frame)), 0))


def test_changes_of_weights_that_are_not_held_are_refused() -> None:
    worker = Worker(compress_weights="onebit")
    frame = load("onebit", CodecSettings()).encode(torch.randn(NUMEL), 0, None).frame
    with pytest.raises(WireError, match="its change since version 1, which is not held"):
        pulled(worker, 2, to_frame(frame), coded=True)
    worker = Worker(compress_weights="onebit")
    pulled(worker, 0, None, coded=False, weight_buffer=2)
    assert worker.client.take()[0][0] == InWeightBuffer(0, 2)
    assert pulled(worker, 1, to_frame(torch.randn(NUMEL)), coded=False).held_version == -1


def test_weights_that_did_not_all_come_are_no_ground_for_changes_and_those_before_still_are() -> None:
    worker = Worker(compress_weights="int8")
    pulled(worker, 0, to_frame(torch.ones(NUMEL)), coded=False)
    taken(worker)
    worker.client.pull(1, False, 0.0)
    worker.client.handle("server-0", Weights(1, 1, [0]), [to_frame(torch.zeros(NUMEL))])
    assert not taken(worker).any() and not worker.client.complete
    (ask,) = worker.client.pull(3, False, 0.0)
    assert isinstance(ask.body, Pull) and ask.body.held_version == 0


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_a_worker_asks_whether_servers_still_have_its_weights_without_getting_them_again(codec: str) -> None:
    worker = Worker(compress_weights=codec)
    pulled(worker, 3, to_frame(torch.ones(NUMEL)), coded=False)
    taken(worker)
    (ask,) = worker.client.ask_for(3, 0.0)
    assert isinstance(ask.body, Pull) and ask.body.have_chunks == [0, 1] and not ask.body.shared
    assert not worker.client.complete and not worker.client.gone
    worker.client.handle("server-0", Weights(3, 3, [], True), [])
    assert worker.client.complete and worker.client.take()[0] == {}
    worker.client.ask_for(3, 0.0)
    worker.client.handle("server-0", VersionExpired(3, 6), ())
    assert worker.client.gone and not worker.client.complete
    (ask,) = worker.client.pull(4, False, 0.0)  # it holds round 3 still, and changes of it may come
    assert isinstance(ask.body, Pull) and ask.body.held_version == 3
    assert ask.body.have_chunks == []


def test_coded_weights_in_a_run_without_a_codec_are_refused() -> None:
    with pytest.raises(WireError, match="chunk 0 is not one that is compressed"):
        pulled(Worker(), 0, bytes(2 * NUMEL), coded=True)


def test_a_server_without_chunks_may_be_another_process_while_weights_are_awaited() -> None:
    client = ParameterClient(layout_of(), Settings(replicas=1, servers=2), pulls_follow=False)
    assert [send.to for send in client.pull(0, False, 0.0)] == ["server-0"]
    client.replaced(1)
    assert client.tick(1.0) == [] and client.missing() == [("server-0", [0, 1])]


def test_who_comes_late_begins_in_the_earliest_round_that_is_open_anywhere() -> None:
    """Nobody else may be left who could compute what a server still lacks of it."""
    layout = make_layout([TensorSpec(f"{group}", [ROWS, COLUMNS], "float32", group) for group in range(3)], 3)
    client = ParameterClient(layout, Settings(servers=3), pulls_follow=False)
    client.pull(0, False, 0.0)
    assert not client.gone and client.over is None
    client.handle("server-0", VersionExpired(0, 44), ())
    assert client.gone and client.over is None
    client.handle("server-1", VersionExpired(0, 43), ())
    (third,) = layout.on(2)
    client.handle("server-2", Weights(0, 0, [third.id], round_closed=True), [bytes(4 * NUMEL)])
    assert client.over == 43
    client.pull(43, False, 0.0)
    client.handle("server-0", VersionExpired(0, 44), ())  # late
    assert not client.gone and client.over is None


def test_how_long_a_transfer_takes_is_measured_where_nothing_was_sent_early() -> None:
    worker = Worker(near=(0,))
    assert worker.client.sends_any and not worker.client.sends_away
    message = worker.push(worker.gradient_buffer(1.0))
    worker.client.tick(1.0)
    worker.ack(whole(message), [])
    worker.client.tick(3.0)
    assert worker.client.transfer_s == 1.0  # the newest of 2 s counts half
    gradient_buffer, later = worker.gradient_buffer(2.0), replace(PUSH, round=4)
    (early,) = worker.client.push_early(later, 0, Sum(gradient_buffer.chunks[0], 1), 4.0, {}, gradient_buffer)
    worker.client.tick(5.0)
    worker.client.confirm({0}, 9.0)
    worker.ack(whole(early), [])
    worker.client.tick(10.0)
    assert worker.client.idle and worker.client.transfer_s == 1.0
