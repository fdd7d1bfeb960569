"""Rows that servers keep, update and hand out: torch's arithmetic, whatever the number of servers, and each push counts once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from roundtable.common.config.batch_plan import make_segment
from roundtable.common.config.settings import Settings
from roundtable.common.model.layout import Layout, make_layout
from roundtable.common.model.reduction_tree import fold
from roundtable.common.model.row_pages import BLOCK, pages
from roundtable.common.model.sparse_rows import (
    RowSum,
    add_rows,
    cut,
    cut_sums,
    join,
    join_sums,
    local_of,
    no_rows,
    owner_of,
    page_ids,
    rows_on,
    split,
)  # fmt: skip
from roundtable.common.model.tensor_bytes import to_frame
from roundtable.common.protocol.effects import Send
from roundtable.common.protocol.messages.commit import CloseRound
from roundtable.common.protocol.messages.embedding import InitialRows, RowAck, RowPull, RowPush, Rows
from roundtable.common.protocol.messages.gradients import Ack, Pull, Push, Weights
from roundtable.common.protocol.messages.session import Refused
from roundtable.common.protocol.messages.setup import Accepted, InitialWeights, Plan, Request, Setup, Update
from roundtable.common.protocol.model_spec import TableSpec, TensorSpec
from roundtable.common.runtime.errors import WireError
from roundtable.ps.params.embedding import RowTables
from roundtable.ps.server.restoring import make_host
from roundtable.ps.server.shard_host import ShardHost

DIM = 5
ROWS = 300
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "Adagrad-settings": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2}),
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
    "Adam-eps": (torch.optim.Adam, {"lr": 0.01, "eps": 0.1}),
    "amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.0, "betas": (0.5, 0.9)}),
}
touched_sets = st.lists(st.sets(st.integers(0, ROWS - 1), max_size=40), min_size=1, max_size=5)


def rows_of(ids: set[int] | Sequence[int], seed: int = 0, used: bool = True) -> RowSum:
    chosen = torch.tensor(sorted(ids), dtype=torch.int64)
    return RowSum(chosen, torch.randn(len(chosen), DIM, generator=torch.Generator().manual_seed(seed)), used)


class Cluster:
    """The tables of all servers."""

    def __init__(self, servers: int, recipe: str, std: float | None = None, rows: int = ROWS, seed: int = 0) -> None:
        cls, hyper = OPTIMIZERS[recipe]
        group = {k: v for k, v in cls([torch.zeros(1)], **hyper).param_groups[0].items() if k != "params"}
        update = Update(cls.__name__, [group])
        self.layout = make_layout([], servers, [TableSpec("table", rows, DIM, 0, std)])
        self.tables = [RowTables(self.layout, m, update, seed, keeps_versions=True) for m in range(servers)]
        if std is None:
            for page in pages(self.layout.tables[0]):
                ids = page_ids(self.layout.tables[0], page)
                for server, table in enumerate(self.tables):
                    table.load(0, page, cut(start()[ids[owner_of(ids, servers) == server]]))

    def step(self, total: RowSum, samples: int, hypers: Sequence[dict[str, Any]] = ()) -> None:
        for table, part in zip(self.tables, split([total], len(self.tables)), strict=True):
            table.apply(part, samples, hypers)

    def read(self, version: int, ids: torch.Tensor | None = None) -> torch.Tensor:
        ids = torch.arange(self.layout.tables[0].rows) if ids is None else ids
        out = torch.empty(len(ids), DIM)
        owners = owner_of(ids, len(self.tables))
        for server, table in enumerate(self.tables):
            mine = ids[owners == server]
            found = table.read(RowPull(1, 0, version, len(mine)), cut(mine))
            assert found is not None and found[0] == len(mine)
            out[owners == server] = join(iter(found[1]), "float32", len(mine) * DIM, "").view(-1, DIM)
        return out


def start() -> torch.Tensor:
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(99))


# ---- where rows are, and sums of them


@given(st.integers(1, 700), st.integers(1, 5))
def test_every_row_has_one_place_on_one_server(rows: int, servers: int) -> None:
    ids = torch.arange(rows)
    owners, places = owner_of(ids, servers), local_of(ids, servers)
    for server in range(servers):
        mine = places[owners == server]
        assert mine.tolist() == list(range(rows_on(server, servers, rows)))


@given(st.lists(st.sets(st.integers(0, 50), max_size=20), min_size=1, max_size=7))
def test_a_sum_of_rows_has_the_bits_of_the_dense_sum_along_the_tree(touched: list[set[int]]) -> None:
    parts = [rows_of(ids, seed) for seed, ids in enumerate(touched)]
    dense = []
    for part in parts:
        whole = torch.zeros(51, DIM)
        whole[part.ids] = part.values
        dense.append(whole)
    total = fold(dict(enumerate(parts)), len(parts), add_rows)
    expected = fold(dict(enumerate(dense)), len(dense), torch.add)
    assert total.ids.tolist() == sorted(set().union(*touched))
    assert torch.equal(total.values, expected[total.ids])


def test_a_row_that_only_one_side_has_keeps_every_bit() -> None:
    negative = RowSum(torch.tensor([3]), torch.full((1, DIM), -0.0))
    total = add_rows(negative, rows_of([1]))
    assert torch.signbit(total.values[1]).all()


def test_contributions_come_out_of_frames_as_they_went_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roundtable.common.model.sparse_rows.CHUNK_BYTES", 64)
    monkeypatch.setattr("roundtable.common.model.row_pages.CHUNK_BYTES", 64)
    specs = make_layout([], 1, [TableSpec(name, ROWS, DIM, 0) for name in "abc"]).tables
    sums = [rows_of(range(30)), rows_of([]), no_rows(specs[2])]
    frames = cut_sums(sums)
    assert max(map(len, frames)) == 64
    found = join_sums(frames, [part.count for part in sums], specs, "it")
    assert [part.used for part in found] == [True, True, False]
    assert all(torch.equal(a.ids, b.ids) and torch.equal(a.values, b.values) for a, b in zip(found, sums, strict=True))
    for counts, some in (([30, 0], frames), ([31, 0, -1], frames), ([30, 0, -1], frames[:-1]), ([29, 0, -1], frames)):
        with pytest.raises(WireError, match="it "):
            join_sums(some, counts, specs, "it")


# ---- updates


@pytest.mark.parametrize("recipe", ["SGD", "Adagrad", "Adagrad-settings"])
@given(touched=touched_sets, servers=st.integers(1, 3), data=st.data())
def test_steps_have_the_bits_of_torchs_on_the_whole_dense_table(
    recipe: str, touched: list[set[int]], servers: int, data: st.DataObject
) -> None:
    cls, hyper = OPTIMIZERS[recipe]
    cluster, plain = Cluster(servers, recipe), nn.Parameter(start())
    optimizer = cls([plain], **hyper)
    for number, ids in enumerate(touched):
        total, samples = rows_of(ids, number), data.draw(st.integers(1, 9))
        optimizer.param_groups[0]["lr"] = rate = 0.1 / (1 + number)
        plain.grad = torch.zeros(ROWS, DIM)
        plain.grad[total.ids] = total.values / samples
        optimizer.step()
        cluster.step(total, samples, [{"lr": rate}])
        assert torch.equal(cluster.read(number + 1), plain)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("recipe", ["SGD", "Adagrad", "Adam"])
@given(touched=touched_sets, servers=st.integers(1, 3))
def test_steps_are_those_of_torchs_sparse_optimizers(recipe: str, touched: list[set[int]], servers: int) -> None:
    """To rounding; SparseAdam differs from Adam in where it adds eps as well, which is why that is small here."""
    cls, hyper = OPTIMIZERS[recipe]
    cluster, plain = Cluster(servers, recipe), nn.Parameter(start())
    optimizer = torch.optim.SparseAdam([plain], eps=1e-12, **hyper) if recipe == "Adam" else cls([plain], **hyper)
    for number, ids in enumerate(touched):
        total = rows_of(ids, number)
        plain.grad = torch.sparse_coo_tensor(total.ids[None], total.values / 4, (ROWS, DIM), check_invariants=True)
        optimizer.step()
        cluster.step(total, 4)
    torch.testing.assert_close(cluster.read(len(touched)), plain.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_adam_has_its_own_eps_and_not_that_of_sparse_adam() -> None:
    cls, hyper = OPTIMIZERS["Adam-eps"]
    cluster, plain, other = Cluster(2, "Adam-eps"), nn.Parameter(start()), nn.Parameter(start())
    optimizer, sparse = cls([plain], **hyper), torch.optim.SparseAdam([other], **hyper)
    for number in range(3):
        total = rows_of(range(ROWS), number)  # with all rows there is nothing lazy about it
        plain.grad = total.values / 4
        other.grad = torch.sparse_coo_tensor(total.ids[None], total.values / 4, (ROWS, DIM), check_invariants=True)
        optimizer.step()
        sparse.step()
        cluster.step(total, 4)
    torch.testing.assert_close(cluster.read(3), plain.detach(), rtol=1e-6, atol=1e-7)
    assert float((cluster.read(3) - other.detach()).abs().max()) > 1e-3


@pytest.mark.parametrize("recipe", OPTIMIZERS)
@given(touched=touched_sets, absent=st.integers(0, 5))
def test_the_number_of_servers_changes_no_bit_and_rows_not_touched_do_not_move(
    recipe: str, touched: list[set[int]], absent: int
) -> None:
    clusters = [Cluster(servers, recipe) for servers in (1, 2, 3)]
    for number, ids in enumerate(touched):
        total = rows_of(ids, number) if number != absent else no_rows(clusters[0].layout.tables[0])
        for cluster in clusters:
            before = cluster.read(number)
            cluster.step(total, 3)
            others = torch.tensor([i not in total.ids for i in range(ROWS)])
            assert torch.equal(cluster.read(number + 1)[others], before[others])
        assert all(torch.equal(cluster.read(number + 1), clusters[0].read(number + 1)) for cluster in clusters)


@given(touched=touched_sets, servers=st.integers(1, 3))
def test_the_version_before_can_be_read_after_an_update(touched: list[set[int]], servers: int) -> None:
    cluster = Cluster(servers, "Adagrad")
    ids = torch.arange(0, ROWS, 3)
    for number, some in enumerate(touched):
        before = cluster.read(number), cluster.read(number, ids)
        cluster.step(rows_of(some, number), 3)
        assert torch.equal(cluster.read(number), before[0]) and torch.equal(cluster.read(number, ids), before[1])
    assert cluster.tables[0].read(RowPull(1, 0, len(touched) + 1, 0), []) is None


def test_rows_that_servers_draw_are_the_same_whoever_has_them_and_whenever_they_are_asked_for() -> None:
    a, b, c, other = (Cluster(m, "SGD", 0.5, 5 * BLOCK + 7, seed) for m, seed in ((1, 0), (3, 0), (2, 0), (1, 1)))
    assert torch.equal(a.read(0), b.read(0)) and not torch.equal(a.read(0), other.read(0))
    assert a.read(0).std().item() == pytest.approx(0.5, rel=0.1) and len(a.read(0).unique()) > 1600
    c.step(rows_of([70, 3, 200]), 1)
    a.step(rows_of([70, 3, 200]), 1)
    assert torch.equal(c.read(1), a.read(1))


@pytest.mark.parametrize(
    ("pull", "ids"),
    [
        (RowPull(1, 0, 0, 2), [5, 4]),
        (RowPull(1, 0, 0, 2), [4, 4]),
        (RowPull(1, 0, 0, 1), [ROWS]),
        (RowPull(1, 0, 0, 1), [-1]),
        (RowPull(1, 0, 0, 1), [BLOCK]),
        (RowPull(1, 0, 0, 2), [1]),
        (RowPull(1, 1, 0, 1), [1]),
    ],
)
def test_questions_for_rows_that_are_not_here_are_refused(pull: RowPull, ids: list[int]) -> None:
    with pytest.raises(WireError):
        Cluster(2, "SGD").tables[0].read(pull, cut(torch.tensor(ids)) if ids else [])


# ---- contributions to servers


def shard(
    policy: str, index: int = 0, servers: int = 2, tensors: bool = True, std: float | None = 0.1
) -> tuple[ShardHost, Layout]:
    """A server of a run of rounds of 4 micro-batches of 2 samples, with a table and a chunk (on server 0)."""
    settings = Settings(servers=servers, global_batch=8, micro_batch=2, policy=policy, transport="tcp")  # type: ignore[arg-type]
    one = make_host(index, settings)
    specs = [TensorSpec("w", [3], "float32", 0)] if tensors else []
    group = {"lr": 0.1, "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False}
    one.handle("worker-0", Setup(specs, Update("SGD", [group]), [TableSpec("table", ROWS, DIM, 0, std)]), [], 0.0)
    assert one.shard is not None
    if one.shard.model.chunks:
        one.handle("worker-0", InitialWeights([0]), [to_frame(torch.zeros(3))], 0.0)
    segment = make_segment(before=None, samples=8, global_batch=8, micro_batch=2, epochs=9, round_limit=None)
    one.handle("worker-0", Plan(segment), [], 0.0)
    return one, one.shard.model.layout


def bodies(sends: list[Send]) -> list[Any]:
    return [send.body for send in sends]


def push_rows(
    one: ShardHost, round_: int, lo: int, hi: int, sender: str = "worker-0", scale: float = 1.0, finite: bool = True
) -> list[Any]:
    """Rows lo..hi-1, all on server 0 (or none, on server 1)."""
    part = rows_of(range(lo, hi) if one.index == 0 else [], 5)
    body = RowPush(round_, lo, hi, 2 * (hi - lo), [part.count], finite=finite)
    return bodies(one.handle(sender, body, cut_sums([RowSum(part.ids, part.values * scale)]), 1.0))


def push_chunk(one: ShardHost, round_: int, lo: int, hi: int) -> list[Any]:
    assert one.shard is not None
    chunks = sorted(one.shard.model.chunks)
    metrics = {} if one.index == 0 else None
    body = Push(round_, lo, hi, 2 * (hi - lo), hi - lo, chunks, [1] * len(chunks), metrics=metrics)
    return bodies(one.handle("worker-0", body, [to_frame(torch.ones(3)) for _ in chunks], 1.0))


def rows_at(one: ShardHost, version: int, ids: Sequence[int]) -> torch.Tensor:
    wanted = torch.tensor(ids, dtype=torch.int64)
    (sent,) = one.handle("worker-0", RowPull(7, 0, version, len(ids)), cut(wanted), 2.0)
    assert isinstance(sent.body, Rows) and sent.body.number == 7 and sent.to == "worker-0"
    return join(iter(sent.frames), "float32", len(ids) * DIM, "").view(-1, DIM)


def test_a_round_is_complete_when_rows_of_all_micro_batches_are_in_and_each_counts_once() -> None:
    one, _ = shard("sync")
    first = rows_at(one, 0, [0, 1, 2, 3])
    push_chunk(one, 0, 0, 4)
    assert one.missing() == [0, 1, 2, 3]  # everything but rows is there
    assert push_rows(one, 0, 0, 2) == [RowAck(0, 0, 2)]
    assert push_rows(one, 0, 0, 1, "worker-1", scale=9.0) == [RowAck(0, 0, 1)]  # it was counted before
    push_rows(one, 0, 3, 4)
    assert one.missing() == [2] and one.version == 0
    assert push_rows(one, 0, 2, 3) == [RowAck(0, 2, 3)]
    assert one.version == 1
    assert push_rows(one, 0, 2, 4, scale=9.0) == [RowAck(0, 2, 4)]  # long over
    values = [rows_of(range(lo, hi), 5).values for lo, hi in ((0, 2), (2, 3), (3, 4))]
    torch.testing.assert_close(rows_at(one, 1, [0, 1, 2, 3]), first - 0.1 * torch.cat(values) / 8)
    assert torch.equal(rows_at(one, 0, [0, 1, 2, 3]), first)


@pytest.mark.parametrize("counts", [True, False])
def test_what_is_not_finite_drops_a_round_of_backup_only_where_it_counts(counts: bool) -> None:
    """Else servers would differ: some have it before the round is closed, and others after."""
    one, _ = shard("backup")
    first = rows_at(one, 0, [0, 1, 2, 3])
    for k in range(4):
        push_chunk(one, 0, k, k + 1)
        push_rows(one, 0, k, k + 1, finite=k != 2)
    one.handle("coordinator", CloseRound(0, [1, 2, 3] if counts else [0, 1, 3]), [], 2.0)
    assert one.version == 1
    assert torch.equal(rows_at(one, 1, [0, 1, 2, 3]), first) is counts


def test_a_server_that_none_of_the_rows_are_on_takes_part_all_the_same() -> None:
    one, layout = shard("sync", index=1, tensors=False)
    assert layout.owners() == [0, 1] and one.shard is not None and not one.shard.model.chunks
    assert one.handle("worker-0", Pull(1, 1), [], 0.0) == []
    push_chunk(one, 0, 0, 4)
    assert one.missing() == [0, 1, 2, 3]
    push_rows(one, 0, 0, 2)
    assert push_rows(one, 0, 2, 4) == [RowAck(0, 2, 4), Weights(1, 1, [], round_closed=True)]
    assert one.version == 1
    assert bodies(one.handle("worker-1", Pull(0, 1), [], 0.0)) == [
        Weights(0, 0, [], round_closed=True)
    ]  # for who has to do some of it again


def test_the_last_word_on_weights_waits_for_the_rows() -> None:
    one, _ = shard("sync")
    assert one.handle("worker-0", Pull(1, 1), [], 0.0) == []
    early = push_chunk(one, 0, 0, 4)
    assert [body.round_closed for body in early if isinstance(body, Weights)] == [False]
    late = push_rows(one, 0, 0, 4)
    assert [body.round_closed for body in late if isinstance(body, Weights)] == [True]


def test_backup_leaves_out_the_rows_of_dropped_micro_batches() -> None:
    one, _ = shard("backup")
    first = rows_at(one, 0, [0, 1, 2, 3])
    for k in (0, 1, 3):
        push_chunk(one, 0, k, k + 1)
        push_rows(one, 0, k, k + 1)
    push_rows(one, 0, 2, 3)
    one.handle("coordinator", CloseRound(0, [0, 1, 3]), [], 2.0)
    assert one.version == 1
    moved = (rows_at(one, 1, [0, 1, 2, 3]) != first).any(1)
    assert moved.tolist() == [True, True, False, True]
    with pytest.raises(WireError):
        push_rows(one, 1, 0, 2)


def test_where_pushes_are_applied_at_once_rows_are_served_as_they_are() -> None:
    one, _ = shard("async")
    first = rows_at(one, 0, [0, 1])
    for _ in range(2):
        assert push_rows(one, 0, 1, 2) == [RowAck(0, 1, 2)]
        found = rows_at(one, 0, [0, 1])
        torch.testing.assert_close(found[1], first[1] - 0.1 * (2 / 8) * rows_of([1], 5).values[0] / 2)
        assert torch.equal(found[0], first[0])
    assert one.missing() == [0, 1, 2, 3]
    push_chunk(one, 0, 1, 2)
    assert one.missing() == [0, 2, 3]
    for k in (0, 2, 3):
        push_chunk(one, 0, k, k + 1)
        push_rows(one, 0, k, k + 1)
    assert one.version == 1 and push_rows(one, 0, 0, 1) == [RowAck(0, 0, 1)]


def test_training_begins_when_first_rows_are_there_and_the_first_copy_counts() -> None:
    one, layout = shard("sync", std=None)
    assert list(pages(layout.tables[0])) == [0]
    wanted = RowPull(1, 0, 0, 1), cut(torch.tensor([0]))
    assert one.handle("worker-0", *wanted, 0.0) == []
    with pytest.raises(WireError):
        push_rows(one, 0, 0, 4)
    values = torch.randn(rows_on(0, 2, ROWS), DIM)
    with pytest.raises(WireError):
        one.handle("worker-0", InitialRows(3, 0, 0), cut(values[1:]), 0.0)
    assert bodies(one.handle("worker-0", InitialRows(3, 0, 0), cut(values), 0.0)) == [Accepted(Request.INITIAL_ROWS, 3)]
    assert bodies(one.handle("worker-0", InitialRows(4, 0, 0), cut(values * 2), 0.0)) == [Accepted(Request.INITIAL_ROWS, 4)]
    assert torch.equal(rows_at(one, 0, [0, 1, 2 * BLOCK]), values[[0, 1, BLOCK]])
    with pytest.raises(WireError):
        one.handle("worker-0", InitialRows(3, 0, 1), cut(values), 0.0)


def test_pushes_that_do_not_fit_change_nothing() -> None:
    one, _ = shard("sync")
    good = rows_of([1], 5)
    for push, sums in [
        (RowPush(0, 0, 3, 6, [1]), good),
        (RowPush(0, 0, 1, 3, [1]), good),
        (RowPush(0, 0, 1, 2, [2]), good),
        (RowPush(0, 0, 1, 2, [1, 1]), good),
        (RowPush(0, 0, 1, 2, [1]), rows_of([BLOCK], 5)),
        (RowPush(1, 0, 1, 2, [1]), good),
        (RowPush(99, 0, 1, 2, [1]), good),
    ]:
        with pytest.raises(WireError):
            one.handle("worker-0", push, cut_sums([sums]), 1.0)
    assert push_chunk(one, 0, 0, 4) == [Ack(0, 0, 4, [0], True)] and one.missing() == [0, 1, 2, 3]


def test_other_tables_than_the_first_workers_are_refused_with_a_sentence() -> None:
    one, _ = shard("sync")
    assert one.shard is not None
    known = one.shard.model.setup
    other = Setup(known.tensors, known.update, [TableSpec("table", ROWS + 1, DIM, 0, 0.1)])
    (answer,) = bodies(one.handle("worker-1", other, [], 0.0))
    assert isinstance(answer, Refused) and "worker-1's row-sparse tables are not worker-0's" in answer.reason
