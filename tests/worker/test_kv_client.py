"""The key-value client without a server: what it makes of answers that come twice, late and mixed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from roundtable.common.model.tensor_bytes import to_frame
from roundtable.common.protocol.effects import Send
from roundtable.common.protocol.messages.kv import KvPull, KvReply
from roundtable.common.protocol.messages.session import Refused
from roundtable.common.runtime.errors import UsageError
from roundtable.worker.client.kv_client import KvClient

BLOCK = 4


class FakeLink:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.sent: list[Send] = []
        self.on_message: Callable[..., None] = lambda *message: None
        self.on_tick: Callable[[float], list[Send]] = lambda now: []

    def send(self, *messages: Send) -> None:
        self.sent += messages

    def wait(self, ready: Callable[[], bool], timeout: float, what: Callable[[], str]) -> None:
        assert ready(), what()


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> FakeLink:
    monkeypatch.setattr("roundtable.worker.client.kv_client.CHUNK_BYTES", 4 * BLOCK)
    return FakeLink()


def answer(link: FakeLink, id_: int, version: int, block: int, size: int = BLOCK) -> None:
    frames = [to_frame(torch.full((size,), float(version)))]
    link.on_message("server-0", KvReply(id_, version, "float32", block), frames)


def test_blocks_of_two_answers_to_one_question_are_not_mixed(link: FakeLink) -> None:
    client, out = KvClient(link, 2, 1.0), torch.zeros(3 * BLOCK)  # type: ignore[arg-type]
    stamp = client.pull("key", out)
    body: Any = link.sent[-1].body
    assert isinstance(body, KvPull)
    for version, block in [(7, 0), (7, 1), (9, 2), (9, 0), (7, 2)]:
        answer(link, body.id, version, block)
        with pytest.raises(AssertionError, match="to answer"):
            client.wait(stamp)
    answer(link, body.id, 9, 1)
    client.wait(stamp)
    assert out.tolist() == [9.0] * len(out)
    answer(link, body.id, 11, 1)
    assert out.tolist() == [9.0] * len(out)


def test_while_blocks_keep_coming_the_question_is_not_asked_again(link: FakeLink, monkeypatch: pytest.MonkeyPatch) -> None:
    client, out, now = KvClient(link, 1, 1.0), torch.zeros(3 * BLOCK), [100.0]  # type: ignore[arg-type]
    monkeypatch.setattr("roundtable.worker.client.kv_client.time.monotonic", lambda: now[0])
    client.pull("key", out)
    body: Any = link.sent[-1].body
    for block in range(2):
        now[0] += 4.0
        assert not link.on_tick(now[0])
        answer(link, body.id, 1, block)
    assert not link.on_tick(now[0] + 4.0)
    assert [send.body for send in link.on_tick(now[0] + 6.0)] == [body]


def test_blocks_of_another_type_or_size_are_told_of_in_a_sentence(link: FakeLink) -> None:
    client = KvClient(link, 1, 1.0)  # type: ignore[arg-type]
    for size, dtype, said in [(3, "float32", "does not fit"), (BLOCK, "float64", "holds float64, but was pulled into float32")]:
        stamp = client.pull("key", torch.zeros(BLOCK))
        body: Any = link.sent[-1].body
        link.on_message("server-0", KvReply(body.id, 1, dtype, 0), [to_frame(torch.zeros(size))])
        with pytest.raises(UsageError, match=said):
            client.wait(stamp)
    stamp = client.pull("key", torch.zeros(BLOCK))
    link.on_message("server-0", Refused(f"KvPull:{link.sent[-1].body.id}", "nothing was pushed."), ())  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="nothing was pushed"):
        client.wait(stamp)
