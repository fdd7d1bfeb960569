"""Servers with sharded layers that answer at once, in the place of a worker's link: what runs are compared with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from roundtable.common.model.layout import make_layout
from roundtable.common.model.sparse_rows import owner_of
from roundtable.common.protocol.effects import Send
from roundtable.common.protocol.messages.embedding import InitialRows
from roundtable.common.protocol.messages.setup import Accepted, Request, Update
from roundtable.common.protocol.messages.sharded import LayerAck, LayerPush, ShardedForward
from roundtable.common.protocol.model_spec import ShardedLayerSpec
from roundtable.ps.params.clipping import Norm
from roundtable.ps.sharded.layers import LayerShards
from roundtable.worker.client.io_thread import IoThread
from roundtable.worker.layers.sharded_linear import ShardedLayers, find_layers


class AtOnce:
    """As far as `ShardedLayers` uses a link. `round` is the one that is computed now."""

    def __init__(
        self,
        specs: Sequence[ShardedLayerSpec],
        servers: int,
        update: Update,
        seed: int = 0,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> None:
        self.lock = threading.Condition()
        self.servers = [LayerShards(make_layout([], servers, [], specs), m, update, seed, True, device) for m in range(servers)]
        self.shards: ShardedLayers | None = None
        self.round = 0
        #: By server and first micro-batch: what it has been sent in this round.
        self.pushed: list[dict[int, list[Any]]] = [{} for _ in range(servers)]

    def request(self, to: str, body: Any, answer: Callable[[Any], bool], timeout: float, frames: Any) -> None:
        assert isinstance(body, InitialRows) and answer(Accepted(Request.INITIAL_ROWS, body.id))
        self.servers[int(to[7:])].load(body.table, body.page, frames)

    def send(self, *messages: Send) -> None:
        assert self.shards is not None
        for message in messages:
            number = int(message.to[7:])
            server = self.servers[number]
            if isinstance(message.body, ShardedForward):
                answer = server.ask("worker-0", message.body, message.frames)
                while answer is None:
                    assert server.busy
                    done = server.work()
                    answer = done[1] if done is not None else None
                self.shards.client.handle(message.to, *answer)
            elif isinstance(message.body, LayerPush):
                push = message.body
                self.pushed[number][push.lo] = server.receive("worker-0", push, message.frames)
                self.shards.client.handle(message.to, LayerAck(push.round, push.lo, push.hi), [])

    def wait(self, ready: Callable[[], Any], timeout: float, what: Callable[[], str]) -> Any:
        assert ready(), what()

    def norms(self, weight: float) -> list[Norm]:
        """Return those of the round's gradient."""
        found = []
        for number, server in enumerate(self.servers):
            while (norms := server.norms(self._parts(number), weight)) is None:
                server.work()
            found += norms
        return sorted(found)

    def close(self, weight: float, hypers: Sequence[Mapping[str, Any]] = (), factor: torch.Tensor | None = None) -> None:
        """The round is complete."""
        for number, server in enumerate(self.servers):
            server.close(self._parts(number), weight, hypers, factor)
            self.pushed[number].clear()
        self.round += 1

    def _parts(self, server: int) -> list[Any]:
        return [part for _, parts in sorted(self.pushed[server].items()) for part in parts]

    def rows(self, layer: int = 0) -> torch.Tensor:
        """All rows, after the last round."""
        for server in self.servers:
            server.finish_updates()
        return rows_of([server._layers[layer] for server in self.servers])


def rows_of(shards: Sequence[Any]) -> torch.Tensor:
    """The rows (C, dim) of a sharded layer, whose shards these are."""
    spec = shards[0].spec
    owners = owner_of(torch.arange(spec.rows), len(shards))
    out = torch.empty(spec.rows, spec.dim, dtype=shards[0]._values.dtype)
    for server, shard in enumerate(shards):
        out[owners == server] = shard.read(torch.arange(len(shard._values))).cpu()
    return out


def sharded(
    model: torch.nn.Module,
    servers: int,
    update: Update,
    seed: int = 0,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> tuple[ShardedLayers, AtOnce]:
    """Have the sharded layers of `model` on servers that answer at once."""
    layers = find_layers(model, [{"params": [p for p in model.parameters() if p.requires_grad]}])
    link = AtOnce([one.spec for one in layers], servers, update, seed, device)
    shards = link.shards = ShardedLayers(cast(IoThread, link), layers, servers, lambda: link.round, 1.0, 0, 0, True)
    return shards, link
