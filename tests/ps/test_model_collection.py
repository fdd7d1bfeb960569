"""The model's file is made of what servers hand in, whatever the order, and is one that safetensors reads."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import roundtable
from roundtable.common.config.settings import Settings
from roundtable.common.model.layout import Layout, message_batches
from roundtable.common.model.row_pages import pages
from roundtable.common.model.sparse_rows import cut, owner_of, page_ids
from roundtable.common.model.tensor_bytes import to_frame
from roundtable.common.policies import load
from roundtable.common.protocol.effects import COORDINATOR
from roundtable.common.protocol.messages.embedding import InitialRows
from roundtable.common.protocol.messages.saving import ModelPart, SendModel
from roundtable.common.protocol.messages.setup import InFile, InitialWeights, Setup, SetupReply, Update
from roundtable.common.runtime.errors import WireError
from roundtable.common.storage.run_files import MODEL_FILE
from roundtable.ps.coordinator.model_collection import ModelCollection
from roundtable.ps.coordinator.results import ModelFile, rules_in
from roundtable.ps.coordinator.state.ledger import Ledger
from roundtable.ps.model_parts import parts_on, sizes, spans
from roundtable.ps.server.restoring import make_host
from roundtable.ps.server.shard_host import ShardHost
from roundtable.ps.validation import check_file
from roundtable.worker.layers.sharded_linear import OnServers, find_layers
from roundtable.worker.layers.sparse_embedding import find_tables
from roundtable.worker.model_contents import file_of
from roundtable.worker.replica.replica import Replica

#: A chunk, so that most tensors are in several parts.
CHUNK = 4096


class Network(nn.Module):
    """Tied and non-contiguous weights, several dtypes, buffers that are not saved or empty, a table, and sharded layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.a = nn.Linear(40, 50)
        self.again = self.a
        self.norm = nn.BatchNorm1d(50)
        self.low = nn.Linear(50, 3, dtype=torch.bfloat16)
        self.turned = nn.Linear(3, 3)
        self.turned.weight = nn.Parameter(torch.randn(3, 3).t())
        self.precise = nn.Parameter(torch.randn(7, dtype=torch.float64))
        self.tied = nn.Linear(40, 50, bias=False)
        self.tied.weight = self.a.weight
        self.none = nn.Parameter(torch.empty(0, 3))
        self.table = nn.Embedding(1000, 5, sparse=True)
        self.head = roundtable.ShardedLinear.of(nn.Linear(6, 700))
        self.wide = roundtable.ColumnParallelLinear.of(nn.Linear(4, 300, bias=False))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("nothing", torch.empty(0, 4))
        self.register_buffer("scratch", torch.ones(9), persistent=False)


def made(servers: int, policy: str = "sync") -> tuple[Network, Setup, Layout, list[ShardHost]]:
    """A model, and servers that have its first weights."""
    settings = Settings(workers=1, servers=servers, policy=policy, transport="tcp")  # type: ignore[arg-type]
    model = Network()
    groups = [{"params": list(model.parameters())}]
    tables, layers = find_tables(model, groups), find_layers(model, groups)
    weights = [table.module.weight for table in tables] + [one.layer.weight for one in layers]
    on_servers = [*weights, *(one.layer.bias for one in layers)]
    dense = {id(p): 0 for p in model.parameters() if all(p is not other for other in on_servers)}
    replica = Replica(model, dense, servers, [table.spec for table in tables], [one.spec for one in layers])
    file = file_of(model, [*replica.tensors, *on_servers], replica.specs)
    layout = replica.layout
    setup = Setup(replica.specs, Update("SGD", [{"lr": 0.1}]), layout.tables, layout.sharded_layers, file)
    shards = [make_host(server, settings) for server in range(servers)]
    for shard in shards:
        shard.handle("worker-0", setup, (), 0.0)
    first = {chunk.id: replica.first_weights(chunk.id) for chunk in layout.chunks}
    for shard in shards:
        for ids in message_batches([chunk.id for chunk in layout.on(shard.index)], lambda i: len(first[i])):
            shard.handle("worker-0", InitialWeights(ids), [first[i] for i in ids], 0.0)
    for number, spec in enumerate([*layout.tables, *layout.sharded_layers]):
        whole = _whole(model, number)
        for page in pages(spec):
            ids = page_ids(spec, page)
            for server, shard in enumerate(shards):
                rows = cut(whole[ids[owner_of(ids, servers) == server]].contiguous())
                shard.handle("worker-0", InitialRows(page, number, page), rows, 0.0)
    return model, setup, layout, shards


def _whole(model: Network, number: int) -> torch.Tensor:
    """All columns of the table or sharded layer of that number."""
    layer: Any = [model.table, model.head, model.wide][number]
    bias = [layer.bias.detach()[:, None]] if isinstance(layer, OnServers) and layer.bias is not None else []
    return torch.cat([layer.weight.detach(), *bias], 1)


def deliver(shards: Sequence[ShardHost], asked: Sequence[tuple[int, SendModel]]) -> list[tuple[int, ModelPart, Sequence[Any]]]:
    """The servers' answers."""
    out = []
    for server, body in asked:
        effects = shards[server].handle(COORDINATOR, body, (), 0.0)
        while shards[server].busy:
            effects += shards[server].work(0.0)
        out += [(server, e.body, e.frames) for e in effects if isinstance(e.body, ModelPart)]
    return out


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("roundtable.common.model.layout", "roundtable.common.model.sparse_rows", "roundtable.common.model.row_pages"):
        monkeypatch.setattr(f"{module}.CHUNK_BYTES", CHUNK)
    monkeypatch.setattr("roundtable.ps.coordinator.model_collection.CREDIT_BYTES", 2 * CHUNK)
    monkeypatch.setattr("roundtable.ps.coordinator.model_collection.ALL_BYTES", 4 * CHUNK)
    monkeypatch.setattr("roundtable.ps.coordinator.results._HASH_BYTES", 1000)
    monkeypatch.setattr("roundtable.ps.coordinator.results._SYNC_BYTES", 3 * CHUNK)


@pytest.mark.parametrize(("servers", "policy"), [(1, "sync"), (3, "sync"), (2, "async")])
def test_parts_in_any_order_and_twice_make_the_file_of_the_state_dict(servers: int, policy: str, tmp_path: Path) -> None:
    model, setup, layout, shards = made(servers, policy)
    check_file(setup.file, sizes(layout))
    chance = random.Random(3)
    file, collecting = ModelFile(tmp_path, setup.file, sizes(layout), rules_in(setup)), ModelCollection(layout, 0)
    file.begin()
    now, most = 0.0, 0
    while not collecting.complete:
        now += 100.0  # what is missing is asked for again
        asked = collecting.ask(now)
        most = max(most, sum(sum(one.asked.values()) for one in collecting._servers.values()))
        answers = deliver(shards, asked)
        chance.shuffle(answers)
        for server, body, frames in answers[: 1 + len(answers) // 2]:
            file.write(collecting.take(server, body, frames))
            collecting.took(server, body)
            with pytest.raises(WireError, match="not asked for"):
                collecting.take(server, body, frames)
            while file.hash_some():
                pass
    assert 0 < most <= 4 * CHUNK + servers * CHUNK
    assert file.hashed and not file.complete and not (tmp_path / MODEL_FILE).exists()
    file.finish()
    read, state = load_file(tmp_path / MODEL_FILE), model.state_dict()
    assert read.keys() == state.keys() and {"tied.weight", "again.bias", "nothing"} <= read.keys() and "scratch" not in read
    for name, tensor in state.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    digest = hashlib.sha256(b"".join(bytes(to_frame(p.detach().contiguous())) for _, p in sorted(model.named_parameters())))
    assert file.complete and file.weights_sha256 == digest.hexdigest()
    with safe_open(tmp_path / MODEL_FILE, "pt") as opened:
        assert json.loads(opened.metadata()["buffers"]) == {
            "norm.running_mean": "mean",
            "norm.running_var": "mean",
            "norm.num_batches_tracked": "max",
            "mask": "last",
        }
        assert opened.metadata() == {"format": "pt", "weights_sha256": digest.hexdigest(), "buffers": mock.ANY}
    assert [path.name for path in tmp_path.iterdir()] == [MODEL_FILE]


def test_parts_cover_each_byte_once_whatever_the_number_of_servers() -> None:
    for servers in (1, 2, 5):
        _, _, layout, _ = made(servers)
        covered: dict[int, list[tuple[int, int]]] = {}
        for server in range(servers):
            for part in parts_on(layout, server):
                places = list(spans(layout, server, part))
                assert sum(place.length for place in places) == part.bytes > 0
                for place in places:
                    covered.setdefault(place.of, []).append((place.start, place.length))
        for of, size in enumerate(sizes(layout)):
            end = 0
            for start, length in sorted(covered.get(of, [])):
                assert start == end
                end += length
            assert end == size


# I25
def test_a_part_is_taken_only_from_the_server_that_was_asked_and_with_its_size() -> None:
    _, _, layout, shards = made(2)
    collecting = ModelCollection(layout, 0)
    (server, body, frames), *_ = deliver(shards, collecting.ask(0.0))
    for bad_server, bad_body, bad_frames in [
        (1 - server, ModelPart(0, 999), frames),
        (7, body, frames),
        (server, ModelPart(1, body.part), frames),
        (server, ModelPart(0, 999), frames),
        (server, body, [*frames, b"x"]),
        (server, body, []),
    ]:
        with pytest.raises(WireError):
            collecting.take(bad_server, bad_body, bad_frames)
    assert b"".join(bytes(data) for _, data in collecting.take(server, body, frames)) == b"".join(map(bytes, frames))


def test_a_server_in_the_place_of_another_is_asked_at_once() -> None:
    _, _, layout, _ = made(2)
    collecting = ModelCollection(layout, 0)
    first = dict(collecting.ask(0.0))
    assert collecting.ask(1.0) == []
    collecting.replaced(1)
    assert collecting.ask(1.0) == [(1, first[1])]


def test_a_server_that_is_past_the_round_or_not_there_yet_hands_in_nothing() -> None:
    _, _, _, (shard,) = made(1)
    assert deliver([shard], [(0, SendModel(1, [0]))]) == []
    assert [body for _, body, _ in deliver([shard], [(0, SendModel(0, [0, 10_000]))])] == [ModelPart(0, 0)]


def test_what_is_written_in_vain_is_missing_still(tmp_path: Path) -> None:
    _, setup, layout, shards = made(1)
    file, collecting = ModelFile(tmp_path, setup.file, sizes(layout)), ModelCollection(layout, 0)
    file.begin()
    server, body, frames = deliver(shards, collecting.ask(0.0))[0]
    with mock.patch("os.pwrite", side_effect=OSError("no space left")), pytest.raises(OSError, match="no space"):
        file.write(collecting.take(server, body, frames))
    assert body.part in collecting.ask(1000.0)[0][1].parts
    file.write(collecting.take(server, body, frames))
    collecting.took(server, body)
    assert all(body.part not in asked.parts for _, asked in collecting.ask(2000.0))


def complete(folder: Path) -> tuple[Network, ModelFile]:
    model, setup, layout, shards = made(2)
    file, collecting = ModelFile(folder, setup.file, sizes(layout)), ModelCollection(layout, 0)
    file.begin()
    while not collecting.complete:
        for server, body, frames in deliver(shards, collecting.ask(0.0)):
            file.write(collecting.take(server, body, frames))
            collecting.took(server, body)
    while file.hash_some():
        pass
    file.finish()
    return model, file


def test_statistics_that_were_computed_anew_are_put_in_place_and_parameters_are_not(tmp_path: Path) -> None:
    model, file = complete(tmp_path)
    mean = torch.arange(50.0)
    file.revise(["norm.running_mean"], [to_frame(mean)])
    read = load_file(tmp_path / MODEL_FILE)
    assert torch.equal(read["norm.running_mean"], mean) and torch.equal(read["norm.running_var"], model.norm.running_var)  # type: ignore[arg-type]
    for names, values in [(["a.bias"], [to_frame(mean)]), (["norm.running_var"], [b"x"]), (["x"], [b""]), (["mask"], [])]:
        with pytest.raises(WireError):
            file.revise(names, [memoryview(value) for value in values])
    (tmp_path / MODEL_FILE).rename(tmp_path / (MODEL_FILE + ".tmp"))  # as where it was killed in the middle
    file.revise(["norm.running_mean"], [to_frame(mean + 1)])
    assert torch.equal(load_file(tmp_path / MODEL_FILE)["norm.running_mean"], mean + 1)
    file.discard()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"name": "again.weight"}, {"dtype": "F64"}, {"dtype": "strange"}, {"shape": [50, 41]}, {"of": [10_000]}, {"of": []},
        {"of": [0, 0]},
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_is_refused_with_the_setup(change: dict[str, Any]) -> None:
    _, setup, layout, _ = made(1)
    first = {name: getattr(setup.file[0], name) for name in InFile.__struct_fields__}
    assert first["name"] == "a.bias" and first["shape"] == [50]
    wrong = InFile(**{**first, **change})
    with pytest.raises(WireError):
        check_file([wrong, *setup.file[1:]], sizes(layout))
    settings = Settings(workers=1, servers=1)
    assert Ledger(settings, load(settings)).set_up(setup) == SetupReply()
