"""Weights that lie in servers' memory: pieced together over servers, private to the script, and new with each version."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from roundtable.common.model.layout import CHUNK_BYTES
from roundtable.common.model.tensor_bytes import to_frame
from roundtable.ps.params.weight_buffers import WeightBuffers
from roundtable.worker.replica.mapped_weights import InWeightBuffer
from roundtable.worker.replica.replica import Replica

pytestmark = pytest.mark.usefixtures("one_thread")

SERVERS = 2


class Cluster:
    """A replica and the weight buffers of two servers, which hold version v as the number v in every weight."""

    def __init__(self, model: nn.Module, shared: tuple[bool, ...] = (True, True)) -> None:
        self.replica = Replica(model, {id(p): 0 for p in model.parameters()}, SERVERS)
        self.weight_buffers = [WeightBuffers(self.replica.layout.on(server), 4, shared[server]) for server in range(SERVERS)]
        for server, weight_buffers in enumerate(self.weight_buffers):
            if weight_buffers.handle is not None:
                self.replica.mapped.attach(server, weight_buffers.handle)

    def publish(self, version: int, weight_buffers: tuple[int, int]) -> None:
        for server, weight_buffer in enumerate(weight_buffers):
            for chunk, values in self.weight_buffers[server][weight_buffer].items():
                values.copy_(torch.arange(values.numel()) % 97 + version + 1000 * chunk)

    def take(self, weight_buffers: tuple[int, int]) -> None:
        found = {}
        for chunk in self.replica.layout.chunks:
            weight_buffer = weight_buffers[chunk.server]
            if self.weight_buffers[chunk.server].handle is not None:
                found[chunk.id] = InWeightBuffer(chunk.server, weight_buffer)
            else:
                found[chunk.id] = to_frame(self.weight_buffers[chunk.server][weight_buffer][chunk.id].clone())
        self.replica.load(found, copy=False)

    def check(self, version: int) -> None:
        for chunk in self.replica.layout.chunks:
            values = torch.arange(chunk.numel, dtype=torch.float32) % 97 + version + 1000 * chunk.id
            for piece in chunk.pieces:
                tensor = self.replica.tensors[piece.tensor].detach().reshape(-1)
                part = tensor[piece.start : piece.start + piece.length]
                assert torch.equal(part, values[piece.offset : piece.offset + piece.length].to(part.dtype))


@pytest.fixture
def model() -> nn.Module:
    """One tensor in three chunks on two servers, one in one chunk, and small ones."""
    return nn.Sequential(nn.Linear(1100, 2500), nn.Linear(2500, 300), nn.Linear(300, 2))


def test_a_tensor_over_several_servers_is_one_piece_that_nobody_copied(model: nn.Module) -> None:
    cluster = Cluster(model)
    assert model[0].weight.nbytes > 2 * CHUNK_BYTES
    assert {c.server for c in cluster.replica.chunks_of(0)} == {0, 1}
    for version, weight_buffers in enumerate([(0, 0), (1, 1), (0, 2), (3, 1), (0, 0)]):
        cluster.publish(version, weight_buffers)
        cluster.take(weight_buffers)
        cluster.check(version)
    cluster.publish(7, (0, 0))  # written by the servers: the model shows it, for it is the same memory
    large = model[0].weight.detach().reshape(-1)
    assert float(large[1]) == 1 + 7 + 1000 * cluster.replica.chunks_of(0)[0].id
    assert model[0].weight.data_ptr() % 64 == 0


def fill(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.fill_(-1.0)


def fill_data(parameter: nn.Parameter) -> None:
    parameter.data.fill_(-1.0)  # torch does not count this as a write


@pytest.mark.parametrize("write", [fill, fill_data])
def test_what_a_script_writes_into_weights_is_its_own_and_gone_with_the_next_version(write: Any, model: nn.Module) -> None:
    one, other = Cluster(model), nn.Sequential(*(nn.Linear(m.in_features, m.out_features) for m in model))
    second = Replica(other, {id(p): 0 for p in other.parameters()}, SERVERS)
    for server, weight_buffers in enumerate(one.weight_buffers):
        assert weight_buffers.handle is not None
        second.mapped.attach(server, weight_buffers.handle)
    one.publish(1, (0, 0))
    one.take((0, 0))
    for parameter in model.parameters():
        write(parameter)
    second.load({c.id: InWeightBuffer(c.server, 0) for c in second.layout.chunks}, copy=False)
    assert all(bool((p != -1).all()) for p in other.parameters())
    for version, weight_buffers in [(2, (1, 1)), (3, (0, 0))]:  # also where it wrote to
        one.publish(version, weight_buffers)
        one.take(weight_buffers)
        one.check(version)


def test_what_a_script_writes_does_not_hide_new_weights_beside_it() -> None:
    model = nn.Module()
    model.copied = nn.Parameter(torch.randn(4, 4).t())
    model.mapped = nn.Parameter(torch.randn(16))
    cluster = Cluster(model)
    cluster.publish(1, (0, 0))
    cluster.take((0, 0))
    model.mapped.data.fill_(-1.0)
    cluster.publish(2, (0, 0))
    cluster.take((0, 0))
    cluster.check(2)


@pytest.mark.parametrize("shared", [(False, False), (True, False), (False, True)])
def test_where_a_server_shares_nothing_its_weights_are_copied(shared: tuple[bool, bool], model: nn.Module) -> None:
    cluster = Cluster(model, shared)
    for version, weight_buffers in enumerate([(0, 0), (1, 1), (0, 0)]):
        cluster.publish(version, weight_buffers)
        cluster.take(weight_buffers)
        cluster.check(version)
