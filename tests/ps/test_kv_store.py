"""The key-value store: each pull sees pushes whole and in one order, if blocks come twice, late or never."""

from __future__ import annotations

import itertools
import random
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from roundtable.common.model.tensor_bytes import from_frame, to_frame
from roundtable.common.protocol.messages.kv import KvPull, KvPush, KvReply
from roundtable.common.protocol.messages.session import Refused
from roundtable.common.runtime.errors import WireError
from roundtable.ps.server.kv_store import KvStore

NUMEL, BLOCK = 11, 4  # elements of the key and of a block


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roundtable.ps.server.kv_store.CHUNK_BYTES", 4 * BLOCK)


class Client:
    """Makes the messages of one worker's pushes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._ids = itertools.count()

    def push(self, values: torch.Tensor, op: str = "add", key: str = "k") -> list[tuple[KvPush, list[Any]]]:
        number = next(self._ids)
        return [
            (KvPush(next(self._ids), key, block, len(values), "float32", op, number), [to_frame(part.clone())])  # type: ignore[arg-type]
            for block, part in enumerate(values.split(BLOCK))
        ]


def say(store: KvStore, client: Client, push: KvPush, frames: list[Any]) -> None:
    ((reply, _),) = store.handle(client.name, 1, push, frames)
    assert isinstance(reply, KvReply)


def pulled(store: KvStore, numel: int = NUMEL) -> tuple[int, list[Any]]:
    """The version, and frames with the blocks."""
    replies = store.handle("worker-9", 1, KvPull(0, "k", numel), [])
    bodies = [body for body, _ in replies if isinstance(body, KvReply)]
    assert [body.block for body in bodies] == list(range(-(-numel // BLOCK)))
    (version,) = {body.version for body in bodies}
    return version, [frame for _, (frame,) in replies]


def value_of(frames: list[Any]) -> torch.Tensor:
    return torch.cat([from_frame(bytes(frame), "float32", frame.nbytes // 4, "k") for frame in frames])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(1, 4), st.integers(0, 1 << 40))
def test_a_pull_sees_the_first_pushes_whole_and_nothing_of_the_others(writers: int, seed: int) -> None:
    chance, store = random.Random(seed), KvStore(1024)
    clients = [Client(f"worker-{number}") for number in range(writers)]
    unsent: list[list[tuple[KvPush, list[Any]]]] = [[] for _ in clients]
    after, sent, seen = [torch.zeros(0)], [], []
    for _ in range(60):
        writer = chance.randrange(writers)
        if not unsent[writer]:
            whole = torch.full((NUMEL,), float(chance.randrange(1, 100)))
            op = chance.choice(["add", "add", "add", "set"]) if len(after) > 1 else "set"
            unsent[writer] = clients[writer].push(whole, op)
            chance.shuffle(unsent[writer])  # some was lost and is sent again
            unsent[writer].append((whole, op))  # type: ignore[arg-type]
        push, frames = unsent[writer].pop(0)
        say(store, clients[writer], push, frames)
        sent.append((clients[writer], push, frames))
        if len(unsent[writer]) == 1:
            whole, op = unsent[writer].pop()  # type: ignore[assignment]
            after.append(whole if op == "set" else after[-1] + whole)
        if chance.random() < 0.3:
            say(store, *chance.choice(sent[-5:]))
        if chance.random() < 0.4 and len(after) > 1:
            seen.append(pulled(store))
            assert seen[-1][0] == len(after) - 1
    for version, parts in seen:  # now, for what is on its way must stay what it was
        assert torch.equal(value_of(parts), after[version])


def test_a_push_that_its_worker_does_not_complete_counts_for_nothing() -> None:
    store, one, two = KvStore(1024), Client("worker-0"), Client("worker-1")
    for part in one.push(torch.ones(NUMEL)):
        say(store, one, *part)
    for part in two.push(torch.full((NUMEL,), 5.0))[:-1]:
        say(store, two, *part)
    before = store._bytes
    store.forget("worker-1")
    assert store._bytes == 4 * NUMEL + 2504 < before  # three blocks of a value
    assert value_of(pulled(store)[1]).tolist() == [1.0] * NUMEL


def test_a_push_that_no_longer_fits_when_it_is_complete_is_refused_each_time_and_changes_nothing() -> None:
    store, one, two = KvStore(1024), Client("worker-0"), Client("worker-1")
    first, *_, last = one.push(torch.ones(NUMEL))
    parts = one.push(torch.ones(NUMEL))
    for part in [first, *_, last, *parts[:-1]]:
        say(store, one, *part)
    for part in two.push(torch.zeros(3), "set"):
        say(store, two, *part)
    for _ in range(2):
        with pytest.raises(WireError, match="holds 3 x float32; worker-0 added 11 x float32"):
            store.handle("worker-0", 1, *parts[-1])
    assert value_of(pulled(store, 3)[1]).tolist() == [0.0] * 3
    assert store._bytes == 1516  # 12 of numbers


def test_blocks_that_cannot_be_are_refused() -> None:
    store, one = KvStore(1024), Client("worker-0")
    (push, frames), *_ = one.push(torch.ones(NUMEL))
    for bad, with_frames in [
        (KvPush(1, "k", 3, NUMEL, "float32", "add", 0), frames),
        (KvPush(1, "k", 2, NUMEL, "float32", "add", 0), frames),
        (KvPush(1, "k", 0, NUMEL, "quint8", "add", 0), frames),
        (push, []),
    ]:
        with pytest.raises(WireError):
            store.handle("worker-0", 1, bad, with_frames)
    ((answer, _),) = store.handle("worker-0", 1, KvPull(2, "k", NUMEL), [])
    assert isinstance(answer, Refused) and answer.about == "KvPull:2"


def test_values_and_what_is_on_its_way_take_up_no_more_than_the_run_was_started_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roundtable.ps.server.kv_store.CHUNK_BYTES", 4 << 20)
    store, client = KvStore(8), Client("worker-0")
    numel = (2 << 20) // 4

    def push(key: str, count: int = numel, op: str = "set", client: Client = client) -> None:
        number = next(client._ids)
        body = KvPush(number, key, 0, count, "float32", op, number)  # type: ignore[arg-type]
        store.handle(client.name, 1, body, [to_frame(torch.zeros(count))])

    for key in ("a", "b"):
        push(key)
    push("c", numel // 2)
    with pytest.raises(WireError, match=r"more than a server keeps by key, 8 MiB .*: start the run with more --kv-memory"):
        push("a", 2 * numel)
    push("a", 10)  # what a value had is free again
    push("d")
    other = Client("worker-1")
    with pytest.raises(WireError, match="more than a server keeps by key"):
        for number in range(100):  # parts of pushes that never are whole
            part = KvPush(next(other._ids), f"part {number}", 0, 2 << 20, "float32", "set", number)
            store.handle("worker-1", 1, part, [to_frame(torch.zeros(1 << 20))])
    store.forget("worker-1")
    push("e", 10)
    for key in "abcde":
        with suppress(WireError):
            push(key, 0)
    assert store._bytes < 100_000


def test_keys_without_values_are_counted_too() -> None:
    store, made = KvStore(1), 0
    with pytest.raises(WireError, match="more than a server keeps"):
        for made in range(10_000):
            store.handle("worker-0", 1, KvPush(made, f"{made:1000}", 0, 0, "float32", "set", made), [b""])
    assert 100 < made < 300
