"""Sparse embeddings in a worker: what they look up, contribute, refuse and leave behind."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import roundtable
from roundtable.common.config.settings import Settings
from roundtable.common.model.layout import make_layout
from roundtable.common.model.sparse_rows import RowSum, cut, cut_sums, join_sums, owner_of
from roundtable.common.policies import load
from roundtable.common.protocol.effects import Send
from roundtable.common.protocol.messages.embedding import InitialRows, RowAck, RowPull, RowPush, Rows
from roundtable.common.protocol.messages.setup import Accepted, Request, Update
from roundtable.common.protocol.model_spec import TableSpec
from roundtable.common.protocol.transport import SEND_AGAIN_S
from roundtable.common.runtime.errors import UsageError, WireError
from roundtable.ps.params.embedding import RowTables
from roundtable.worker.client.embedding_client import EmbeddingClient
from roundtable.worker.client.io_thread import IoThread
from roundtable.worker.layers.sparse_embedding import RowSparse, SparseEmbedding, check_training, find_tables

ROWS, DIM = 300, 4
SETTINGS = [{"lr": 1.0, "momentum": 0, "weight_decay": 0}]


class Servers:
    """A link behind which servers answer at once."""

    def __init__(self, tables: list[SparseEmbedding], servers: int) -> None:
        self.lock = threading.Condition()
        layout = make_layout([], servers, [table.spec for table in tables])
        self.tables = [RowTables(layout, m, Update("SGD", [{"lr": 1.0}]), 0, keeps_versions=True) for m in range(servers)]
        self.rows: RowSparse | None = None
        self.asked: list[RowPull] = []

    def request(self, to: str, body: Any, answer: Callable[[Any], bool], timeout: float, frames: Any) -> None:
        assert (
            isinstance(body, InitialRows)
            and answer(Accepted(Request.INITIAL_ROWS, body.id))
            and not answer(Accepted(Request.INITIAL_ROWS, body.id + 1))
        )
        self.tables[int(to[7:])].load(body.table, body.page, frames)

    def send(self, *messages: Send) -> None:
        for message in messages:
            if isinstance(message.body, RowPull):
                self.asked.append(message.body)
                found = self.tables[int(message.to[7:])].read(message.body, message.frames)
                assert found is not None and self.rows is not None
                self.rows.client.handle(message.to, Rows(message.body.number, found[0]), found[1])

    def wait(self, ready: Callable[[], Any], timeout: float, what: Callable[[], str]) -> Any:
        assert ready(), what()


class Net(nn.Module):
    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, DIM, sparse=sparse)
        self.other = nn.Embedding(7, DIM, sparse=sparse)
        self.frozen = nn.Embedding(3, DIM, sparse=True).requires_grad_(False)
        self.head = nn.Linear(DIM, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.table(ids) * self.other(ids % 7) + self.table(ids.flip(0)) + self.frozen(ids % 3)
        return self.head(torch.tanh(hidden)).squeeze(-1)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": [p for p in model.parameters() if p.requires_grad]}]


def replicated(model: nn.Module, servers: int = 2) -> tuple[RowSparse, Servers]:
    tables = find_tables(model, groups_of(model))
    link = Servers(tables, servers)
    rows = link.rows = RowSparse(cast(IoThread, link), tables, servers, lambda: 0, 1.0, sends_first=True)
    return rows, link


def pair(servers: int = 2) -> tuple[Net, Net, RowSparse, Servers]:
    """A model in plain torch, and one of the same weights whose tables are on servers."""
    torch.manual_seed(3)
    plain = Net(sparse=False)
    ours = Net()
    ours.load_state_dict(plain.state_dict())
    return plain, ours, *replicated(ours, servers)


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(ROWS, shape, generator=torch.Generator().manual_seed(5))


def dense(part: RowSum, rows: int) -> torch.Tensor:
    out = torch.zeros(rows, DIM)
    out[part.ids] = part.values
    return out


# ---- looking up and contributing


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("shape", [(40,), (6, 5), (2, 3, 4), (0,)])
def test_lookups_and_gradients_have_the_bits_of_dense_embeddings(servers: int, shape: tuple[int, ...]) -> None:
    plain, ours, rows, _ = pair(servers)
    batch = ids(*shape)
    losses = [model(batch).square().sum() for model in (plain, ours)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert torch.equal(plain.head.weight.grad, ours.head.weight.grad)
    table, other = rows.contribution(3)
    assert torch.equal(dense(table, ROWS), plain.table.weight.grad * 3) and table.ids.tolist() == batch.unique().tolist()
    assert torch.equal(dense(other, 7), plain.other.weight.grad * 3)
    assert [part.used for part in rows.contribution(3)] == [False, False]


def test_several_forwards_before_one_backward_and_several_backwards_are_all_contributed() -> None:
    plain, ours, rows, _ = pair()
    for model in (plain, ours):
        a, b = model(ids(9)).sum(), model(ids(20)).square().sum()
        (a + b).backward()
        again = model(ids(4)).sum()
        again.backward(retain_graph=True)
        again.backward()
    table, other = rows.contribution(1)
    torch.testing.assert_close(dense(table, ROWS), plain.table.weight.grad)
    torch.testing.assert_close(dense(other, 7), plain.other.weight.grad)


def test_without_a_backward_or_with_zero_grad_nothing_is_contributed() -> None:
    plain, ours, rows, _ = pair()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(ours(ids(5)), plain(ids(5))) and not ours(ids(5)).requires_grad
    ours(ids(5))
    ours(ids(5)).sum().backward()
    rows.forget()
    assert not any(part.used for part in rows.contribution(1))


def test_each_server_is_asked_once_for_each_distinct_row_it_has() -> None:
    _, ours, _, link = pair(3)
    ours.table(torch.tensor([[1, 1, 70], [70, 1, 2]]))
    assert [(pull.table, pull.count) for pull in link.asked] == [(0, 2), (0, 1)]


def test_an_id_that_the_table_does_not_have_is_an_index_error_with_its_name() -> None:
    _, ours, _, _ = pair()
    for wrong in (-1, ROWS):
        with pytest.raises(IndexError, match=rf"'table.weight' .*{wrong}.*{ROWS} rows"):
            ours.table(torch.tensor([3, wrong]))


def test_the_weights_memory_is_given_up_and_reading_it_is_an_error() -> None:
    _, ours, _, _ = pair()
    assert ours.table.weight.is_meta and ours.table.weight.shape == (ROWS, DIM)
    for read in (lambda: ours.table.weight.tolist(), lambda: ours.head(ours.table.weight)):
        with pytest.raises(UsageError, match=r"the values of 'table.weight' are on the servers"):
            read()
    assert not ours.frozen.weight.is_meta


def test_a_copy_looks_up_and_contributes_nothing_and_a_saved_model_has_nothing_to_do_with_the_run() -> None:
    plain, ours, rows, _ = pair()
    copied = copy.deepcopy(ours)
    assert torch.equal(copied(ids(8)), plain(ids(8)))
    copied(ids(8)).sum().backward()
    assert not any(part.used for part in rows.contribution(1))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False).table.forward.__func__ is nn.Embedding.forward


def test_an_embedding_that_servers_draw_takes_up_no_memory() -> None:
    module = roundtable.embedding(10_000_000, 64, std=0.01)
    (table,) = find_tables(module, groups_of(module))
    assert table.spec == TableSpec("weight", 10_000_000, 64, 0, 0.01) and module.weight.is_meta
    (drawn,) = find_tables(m := nn.Embedding(10, 2, sparse=True, device="meta"), groups_of(m))
    assert drawn.spec.std == 1.0
    rows, _ = replicated(module)
    assert 0 < module(torch.tensor([5, 9_999_999])).abs().max() < 0.1
    assert not any(part.used for part in rows.contribution(1))


# ---- what cannot be


def refusal(what: Callable[[], Any]) -> str:
    with pytest.raises(UsageError) as caught:
        what()
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and text.count(". ") == 0
    return text


class Own(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def tied() -> nn.Module:
    model = Net()
    model.head.weight = model.other.weight
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Embedding(9, 2, sparse=True, padding_idx=0), "padding_idx"),
        (lambda: nn.Embedding(9, 2, sparse=True, max_norm=1.0), "max_norm"),
        (lambda: nn.Embedding(9, 2, sparse=True, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (lambda: nn.Embedding(9, 2, sparse=True, dtype=torch.bfloat16), "torch.bfloat16"),
        (lambda: nn.Embedding(0, 2, sparse=True), "empty"),
        (lambda: Own(9, 2, sparse=True), "forward of its own"),
        (tied, "another layer"),
    ],
)
def test_embeddings_that_cannot_be_row_sparse_are_refused(make: Callable[[], nn.Module], words: str) -> None:
    model = make()
    assert words in refusal(lambda: find_tables(model, groups_of(model)))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"cls": torch.optim.RMSprop}, "choose one of SGD, Adagrad, Adam, AdamW"),
        ({"settings": [{"momentum": 0.9}]}, "momentum=0"),
        ({"settings": [{"weight_decay": 0.01}]}, "weight_decay=0"),
        ({"policy": load(Settings(policy="local"))}, "policy local"),
        ({"policy": load(Settings(policy="average"))}, "policy average"),
        ({"policy": load(Settings(policy="async", delay_compensation=0.1))}, "--delay-compensation"),
    ],
)
def test_training_that_needs_the_whole_table_is_refused(how: dict[str, Any], words: str) -> None:
    model = Net()
    usual = {"cls": torch.optim.AdamW, "settings": SETTINGS, "policy": load(Settings())}
    tables = find_tables(model, groups_of(model))
    check_training(tables, **usual)  # type: ignore[arg-type]
    assert words in refusal(lambda: check_training(tables, **{**usual, **how}))  # type: ignore[arg-type]
    check_training([], **{**usual, **how})  # type: ignore[arg-type]


# ---- messages


@given(st.data())
def test_rows_arrive_whole_and_in_order_whatever_is_lost_repeated_or_late(data: st.DataObject) -> None:
    specs, servers = [TableSpec("t", ROWS, DIM, 0)], 3
    client, now = EmbeddingClient(specs, servers), 0.0
    values = torch.randn(ROWS, DIM)
    late: list[tuple[str, Rows, Any]] = []
    for _ in range(data.draw(st.integers(1, 4))):
        wanted = torch.tensor(sorted(data.draw(st.sets(st.integers(0, ROWS - 1), max_size=30))), dtype=torch.int64)
        sends = client.pull(0, wanted, 0, now)
        while not client.complete:
            for send in sends:
                asked = cast(RowPull, send.body)
                mine = wanted[owner_of(wanted, servers) == int(send.to[7:])]
                assert asked.count == len(mine)
                answer = send.to, Rows(asked.number, len(mine)), cut(values[mine])
                for _ in range(data.draw(st.integers(0, 2))):
                    client.handle(*answer)
                late.append(answer)
            if data.draw(st.booleans()):
                client.handle(*data.draw(st.sampled_from(late)))
            now += SEND_AGAIN_S
            sends = client.tick(now)
        assert torch.equal(client.take(), values[wanted])


def test_an_answer_of_the_wrong_size_is_refused() -> None:
    client = EmbeddingClient([TableSpec("t", ROWS, DIM, 0)], 1)
    (send,) = client.pull(0, torch.tensor([1, 2]), 0, 0.0)
    assert isinstance(send.body, RowPull)
    for count, rows in ((1, 1), (2, 1)):
        with pytest.raises(WireError):
            client.handle("server-0", Rows(send.body.number, count), cut(torch.zeros(rows, DIM)))
    assert client.missing() == ["server-0"]


def test_a_push_is_sent_until_that_server_acknowledges_it() -> None:
    specs = [TableSpec("t", ROWS, DIM, 0), TableSpec("unused", ROWS, DIM, 0)]
    client = EmbeddingClient(specs, 2)
    part = RowSum(torch.tensor([1, 2, 70]), torch.randn(3, DIM))
    nothing = RowSum(part.ids[:0], part.values[:0], used=False)
    sends = client.push(RowPush(4, 2, 4, 9, []), [part, nothing], {0: 7, 1: 8}, 0.0)
    assert [(s.to, s.body.counts, s.body.base_version) for s in sends] == [("server-0", [2, -1], 7), ("server-1", [1, -1], 8)]
    found = join_sums(sends[1].frames, [1, -1], specs, "it")
    assert found[0].ids.tolist() == [70] and torch.equal(found[0].values, part.values[2:])
    assert bytes(cut_sums(found)[0]) == bytes(sends[1].frames[0])
    client.handle("server-0", RowAck(4, 2, 4), [])
    client.handle("server-0", RowAck(4, 2, 4), [])
    client.handle("server-1", RowAck(4, 2, 3), [])
    assert client.unacknowledged(4) == {2, 3} and client.unacknowledged(3) == set()
    assert client.tick(SEND_AGAIN_S - 1) == []
    assert [s.to for s in client.tick(SEND_AGAIN_S)] == ["server-1"]
    client.handle("server-1", RowAck(4, 2, 4), [])
    assert client.tick(99.0) == [] and client.unacknowledged(4) == set()
