"""Sharded layers in a worker: what they refuse, contribute and leave behind; and what is sent until it is answered."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

import roundtable
from roundtable.common.config.settings import Settings
from roundtable.common.model.sparse_rows import cut, owner_of, rows_on
from roundtable.common.policies import load
from roundtable.common.protocol.messages.setup import Update
from roundtable.common.protocol.messages.sharded import LayerAck, LayerPush, ShardedForward, ShardedForwardReply
from roundtable.common.protocol.model_spec import ShardedLayerSpec
from roundtable.common.protocol.transport import SEND_AGAIN_S
from roundtable.common.runtime.errors import UsageError, WireError
from roundtable.worker.client.sharded_client import ShardedClient
from roundtable.worker.layers.sharded_linear import ShardedLinear, check_sharding, find_layers, sharded_cross_entropy

sys.path.insert(0, str(Path(__file__).parents[1] / "ps"))
from fake_sharded_link import sharded

CLASSES, DIM, BATCH = 300, 4, 6
UPDATE = Update("SGD", [{"lr": 1.0, "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False}])


class Net(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Linear(5, DIM)
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.tanh(self.body(x)))
        return out


def pair(bias: bool = True, servers: int = 2) -> tuple[Net, Net, Any, Any]:
    """A model in plain torch, and one of the same weights whose last layer is on servers."""
    torch.manual_seed(2)
    head = nn.Linear(DIM, CLASSES, bias=bias)
    plain, ours = Net(head), Net(ShardedLinear.of(head))
    return plain, ours, *sharded(ours, servers, UPDATE)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 5, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_losses_and_gradients_are_those_of_a_plain_layer(bias: bool, reduction: Any) -> None:
    plain, ours, shards, link = pair(bias)
    x, y = batch()
    weights = torch.rand(BATCH, generator=torch.Generator().manual_seed(2)) if reduction == "none" else torch.ones(())
    before = link.rows().clone()
    found = sharded_cross_entropy(ours(x), y, reduction=reduction, label_smoothing=0.1)
    expected = cross_entropy(plain(x), y, reduction=reduction, label_smoothing=0.1)
    torch.testing.assert_close(found, expected)
    for losses in (found, expected):
        (losses * weights).sum().backward()
    assert plain.body.weight.grad is not None and ours.body.weight.grad is not None
    torch.testing.assert_close(ours.body.weight.grad, plain.body.weight.grad)
    shards.push(LayerPush(0, 0, 1, BATCH, []), shards.contribution(BATCH), {})
    link.close(BATCH)
    assert isinstance(plain.head, nn.Linear) and plain.head.weight.grad is not None
    torch.testing.assert_close((before - link.rows())[:, :DIM], plain.head.weight.grad, rtol=1e-4, atol=1e-6)


def test_several_losses_and_backwards_of_a_micro_batch_are_all_contributed() -> None:
    plain, ours, shards, link = pair(False)
    x, y = batch()
    before = link.rows().clone()
    loss = sharded_cross_entropy(ours(x), y) + 2 * sharded_cross_entropy(ours(-x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    assert plain.head.weight is not None
    (2 * (cross_entropy(plain(x), y) + 2 * cross_entropy(plain(-x), y))).backward()
    shards.push(LayerPush(0, 0, 1, BATCH, []), shards.contribution(BATCH), {})
    link.close(BATCH)
    assert isinstance(plain.head, nn.Linear) and plain.head.weight.grad is not None
    torch.testing.assert_close(before - link.rows(), plain.head.weight.grad, rtol=1e-4, atol=1e-6)


def test_without_a_backward_or_with_zero_grad_nothing_is_contributed() -> None:
    plain, ours, shards, _ = pair()
    x, y = batch()
    with torch.no_grad():
        torch.testing.assert_close(sharded_cross_entropy(ours(x), y), cross_entropy(plain(x), y))
    sharded_cross_entropy(ours(x), y)
    sharded_cross_entropy(ours(x), y).backward()
    shards.forget()
    assert shards.contribution(1) == []


def test_the_best_classes_are_found_on_all_servers() -> None:
    plain, ours, _, _ = pair(servers=3)
    assert isinstance(ours.head, ShardedLinear) and isinstance(plain.head, nn.Linear)
    x = torch.randn(7, DIM, generator=torch.Generator().manual_seed(1))
    for k in (1, 5, CLASSES):
        values, classes = ours.head.topk(x, k)
        expected, at = plain.head(x).topk(k)
        torch.testing.assert_close(values, expected)
        assert torch.equal(classes[:, :5], at[:, :5])
    _, nearest = pair(False)[1].head.topk(torch.nn.functional.normalize(plain.head.weight.detach()[[7, 8]]), 1, cosine=True)  # type: ignore[operator, union-attr]
    assert nearest.flatten().tolist() == [7, 8]


def test_a_round_that_is_over_gives_no_contribution_and_says_so() -> None:
    _, ours, shards, link = pair()
    x, y = batch()
    sharded_cross_entropy(ours(x), y).backward()
    shards.push(LayerPush(0, 0, 1, BATCH, []), shards.contribution(BATCH), {})
    link.close(BATCH)
    link.rows()  # somebody asks about round 1
    link.round = 0
    loss = sharded_cross_entropy(ours(x), y)
    shards.forget()  # zero_grad, as some call it between forward and backward
    loss.backward()
    assert shards.round_invalid and shards.contribution(1) == [] and not shards.round_invalid


def test_a_layer_takes_up_no_memory_and_a_copy_of_it_has_nothing_to_do_with_the_run() -> None:
    layer = roundtable.ShardedLinear(128, 10_000_000)
    assert layer.weight.is_meta and layer.weight.shape == (10_000_000, 128) and layer.bias is None
    _, ours, _, _ = pair()
    assert ours.head.weight.is_meta and ours.head.bias.is_meta  # type: ignore[union-attr]
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(ours), torch.load(buffer, weights_only=False)):
        with pytest.raises(UsageError, match=r"run\.optimizer"):
            sharded_cross_entropy(copied(batch()[0]), batch()[1])


# ---- what cannot be


def refusal(what: Callable[[], Any]) -> str:
    with pytest.raises(UsageError) as caught:
        what()
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and text.count(". ") == 0
    return text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"labels": torch.tensor([0, 1, 2, 3, 4, CLASSES])},
            "label 300 is none of the 300 classes of 'head.weight'",
        ),
        ({"labels": torch.tensor([0, 1, 2, 3, 4, -100])}, "label -100 is none"),
        ({"labels": torch.zeros(BATCH)}, "must be integers"),
        ({"labels": torch.zeros(1, dtype=torch.int64)}, "must be integers, one for each sample"),
        ({"features": torch.zeros(BATCH, DIM + 1)}, f"takes (samples, {DIM})"),
        ({"label_smoothing": 1.0}, "below 1"),
        ({"label_smoothing": 0.1, "margin": roundtable.CosFace()}, "goes neither with a margin"),
        ({"margin": roundtable.ArcFace()}, "has a bias"),
        ({"reduction": "max"}, "it must be mean, sum or none"),
        ({"layer": None}, "needs the output of a ShardedLinear"),
    ],
)
def test_losses_that_cannot_be_are_refused_and_lose_nothing(change: dict[str, Any], words: str) -> None:
    _, ours, _, _ = pair()
    usual = {"features": torch.zeros(BATCH, DIM), "labels": torch.zeros(BATCH, dtype=torch.int64), "layer": ours.head}
    assert words in refusal(lambda: sharded_cross_entropy(**{**usual, **change}))
    sharded_cross_entropy(**usual).backward()  # type: ignore[arg-type]


def test_layers_that_cannot_be_are_refused() -> None:
    for arguments in ((0, 5), (5, 1), (5, 5, False, 0.0), (5, 5, False, 1.5)):
        assert "cannot be" in refusal(lambda a=arguments: ShardedLinear(*a))  # type: ignore[misc]
    layer = ShardedLinear(DIM, CLASSES, bias=True)
    for groups in ([{"params": [layer.weight]}], [{"params": [layer.weight]}, {"params": [layer.bias]}], [{"params": []}]):
        assert "one parameter group" in refusal(lambda g=groups: find_layers(layer, g))  # type: ignore[misc]
    assert "torch.float64" in refusal(lambda: sharded(ShardedLinear(DIM, CLASSES).double(), 1, UPDATE))
    assert "k is 0" in refusal(lambda: pair()[1].head.topk(torch.zeros(1, DIM), 0))  # type: ignore[operator]
    assert "run.replicate" in refusal(lambda: layer.topk(torch.zeros(1, DIM), 1))


@pytest.mark.parametrize(
    ("settings", "clips", "words"),
    [
        (Settings(policy="local"), False, "policy local"),
        (Settings(policy="average"), True, "policy average"),
        (Settings(policy="ssp"), True, "clip_norm"),
        (Settings(policy="async", delay_compensation=0.1), False, "--delay-compensation"),
    ],
)
def test_training_that_needs_the_rows_elsewhere_is_refused(settings: Settings, clips: bool, words: str) -> None:
    layer = ShardedLinear(DIM, CLASSES)
    found = find_layers(layer, [{"params": [layer.weight]}])
    assert words in refusal(lambda: check_sharding(found, load(settings), clips))
    for policy, also in (("backup", True), ("sync", True), ("ssp", False), ("async", False)):
        check_sharding(found, load(Settings(policy=policy)), also)  # type: ignore[arg-type]
    check_sharding([], load(settings), clips)


# ---- messages


def answer(
    question: ShardedForward, labels: torch.Tensor, server: int, servers: int, value: float
) -> tuple[ShardedForwardReply, list[Any]]:
    own = int((owner_of(labels, servers) == server).sum())
    parts = [torch.full((BATCH,), value), torch.ones(BATCH), torch.ones(BATCH, DIM), torch.full((own, DIM), value)]
    return ShardedForwardReply(question.number), [frame for part in parts for frame in cut(part)]


@given(st.data())
def test_answers_arrive_whole_whatever_is_lost_repeated_or_late(data: st.DataObject) -> None:
    servers, now = 3, 0.0
    client = ShardedClient([ShardedLayerSpec("w", CLASSES, DIM, 0, 0.1)], servers, 7)
    labels = torch.tensor([0, 64, 128, 1, 65, 2])
    late: list[Any] = []
    for number in range(data.draw(st.integers(1, 3))):
        sends = client.ask(ShardedForward(0, 0, number, BATCH, True), [torch.zeros(BATCH, DIM), labels], now)
        assert [send.to for send in sends] == ["server-0", "server-1", "server-2"]
        while not client.complete:
            for send in sends:
                server = int(send.to[7:])
                reply = send.to, *answer(cast(ShardedForward, send.body), labels, server, servers, number + 0.1 * server)
                for _ in range(data.draw(st.sampled_from([1, 0, 2]))):
                    client.handle(*reply)
                late.append(reply)
            if data.draw(st.booleans()):
                client.handle(*data.draw(st.sampled_from(late)))
            now += 1e6 * SEND_AGAIN_S
            sends = client.tick(now)
        found = client.take()
        assert [float(part.largest[0]) for part in found] == pytest.approx([number, number + 0.1, number + 0.2])
        assert [len(part.own) for part in found] == [3, 2, 1]


def test_answers_of_another_size_are_refused_and_a_round_that_is_over_ends_the_wait() -> None:
    client = ShardedClient([ShardedLayerSpec("w", CLASSES, DIM, 0, 0.1)], 2, 7)
    labels = torch.zeros(BATCH, dtype=torch.int64)
    send, _ = client.ask(ShardedForward(0, 0, 0, BATCH, True), [torch.zeros(BATCH, DIM), labels], 0.0)
    body, frames = answer(cast(ShardedForward, send.body), labels, 0, 2, 1.0)
    for some in (frames[:-1], [*frames, frames[0]], [frames[0][:-4], *frames[1:]]):
        with pytest.raises(WireError):
            client.handle("server-0", body, some)
    assert client.missing() == ["server-0", "server-1"]
    client.handle("server-1", ShardedForwardReply(body.number, gone=True), [])
    assert client.complete and client.gone


def test_the_best_of_few_rows_on_a_server_are_all_of_them() -> None:
    client = ShardedClient([ShardedLayerSpec("w", 70, DIM, 0, 0.1)], 2, 7)
    send, _ = client.ask(ShardedForward(0, 0, 0, 1, top=10), [torch.zeros(1, DIM)], 0.0)
    number = cast(ShardedForward, send.body).number
    for server in range(2):
        count = min(10, rows_on(server, 2, 70))
        values, classes = torch.arange(count).float()[None] + server * 0.5, torch.arange(count)[None] + 64 * server
        client.handle(f"server-{server}", ShardedForwardReply(number), [*cut(values), *cut(classes)])
    best, classes = client.take_best()
    assert best[0, :2].tolist() == [9.0, 8.0] and int(classes[0, 0]) == 9


def test_a_push_is_sent_until_each_server_acknowledges_it() -> None:
    client = ShardedClient([ShardedLayerSpec("w", CLASSES, DIM, 0, 0.1)], 2, 7)
    sends = client.push(LayerPush(4, 2, 4, 9, []), [torch.ones(3)], {0: 7, 1: 8}, 0.0)
    assert [send.to for send in sends] == ["server-0", "server-1"]
    client.handle("server-0", LayerAck(4, 2, 4), [])
    client.handle("server-1", LayerAck(4, 2, 3), [])
    assert client.unacknowledged(4) == {2, 3} and client.unacknowledged(3) == set()
    assert client.tick(SEND_AGAIN_S - 1) == []
    assert [send.to for send in client.tick(SEND_AGAIN_S)] == ["server-1"]
    client.handle("server-1", LayerAck(4, 2, 4), [])
    assert client.tick(99.0) == [] and client.unacknowledged(4) == set()
