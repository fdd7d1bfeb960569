"""Weights of the next round go out as the forward pass needs them, but rather out of order than not at all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from common.layout import TensorSpec
from common.messages import Got, Init, Leaving, Plan, Pull, Push, Setup, Share, Update, Weights
from common.plan import make_segment
from common.policies import load
from common.settings import Settings
from common.shared import create
from common.tensors import to_frame
from ps.round_shard import RoundShard
from ps.shard import Send

SMALL = 20_000  # elements, a chunk


class Server:
    def __init__(self, size: int = SMALL) -> None:
        self.size = size
        settings = Settings(workers=2, servers=1, global_batch=4, micro_batch=2)
        self.shard = RoundShard(0, settings, load(settings))
        self.say("worker-0", Setup([TensorSpec(f"t{n}", [size], "float32", 0) for n in range(4)], Update("SGD", [{"lr": 0.1}])))
        self.say(
            "worker-0", Plan(make_segment(before=None, samples=4, global_batch=4, micro_batch=2, epochs=1, round_limit=None))
        )
        self.say("worker-0", Init([0, 1, 2, 3]), 4)

    def say(self, sender: str, body: Setup | Plan | Init | Share | Push | Pull | Got, frames: int = 0) -> list[list[int]]:
        """The chunks of each message with weights that comes of it."""
        effects = self.shard.handle(sender, body, [to_frame(torch.ones(self.size))] * frames, 0.0)
        return list(chunks_in(effects))

    def told(self, now: float) -> list[tuple[str, int]]:
        """Who is told by now of weights of which round that leave the host."""
        effects = self.shard.tick(now)
        return [(effect.to, effect.body.round) for effect in effects if isinstance(effect.body, Leaving)]

    def push(self, worker: int, chunk: int) -> list[list[int]]:
        return self.say(f"worker-{worker}", Push(0, worker, worker + 1, 2, 1, [chunk], [1], hypers=[{}]), 1)


def chunks_in(effects: list[Send]) -> Iterator[list[int]]:
    return (effect.body.chunks for effect in effects if isinstance(effect.body, Weights) and effect.frames)


@pytest.fixture
def server() -> Server:
    """One to whom worker 0 has pushed everything, and now waits for the next round's weights."""
    server = Server()
    assert not any(server.push(0, chunk) for chunk in (3, 2, 1, 0))
    assert server.say("worker-0", Pull(1)) == []
    return server


def test_what_is_needed_later_goes_out_alone_while_nothing_else_can(server: Server) -> None:
    assert server.push(1, 3) == [[3]]
    assert server.push(1, 2) == []  # the network is busy
    assert server.say("worker-0", Got(1, [3])) == [[2]]
    assert server.push(1, 0) == [[0]]
    assert server.push(1, 1) == [[1]]


def test_what_is_next_goes_before_what_is_needed_later(server: Server) -> None:
    assert [server.push(1, chunk) for chunk in (0, 2, 3)] == [[[0]], [], []]
    assert server.push(1, 1) == [[1, 2, 3]]


def test_workers_on_this_host_are_told_while_weights_leave_it_but_not_of_those_that_do_not_arrive() -> None:
    region = create(1 << 20)
    for arrives in (True, False):
        server = Server(1 << 20)  # two of which may be under way
        server.say("worker-1", Share(region.handle))
        assert server.told(0.0) == []
        assert server.say("worker-0", Pull(0)) == [[0], [1]]
        assert server.told(0.1) == [("worker-1", 0)]
        assert server.told(0.3) == []
        assert server.told(0.5) == [("worker-1", 0)]
        if arrives:
            assert server.say("worker-0", Got(0, [0, 1])) == [[2], [3]]
            assert server.told(0.6) == [("worker-1", -1)]
        else:
            assert server.told(2.2) == [("worker-1", -1)]
        assert server.told(3.0) == []
    region.close()
