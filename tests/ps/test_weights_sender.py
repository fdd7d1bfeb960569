"""Weights of the next round go out as the forward pass needs them, but rather out of order than not at all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from roundtable.common.config.batch_plan import make_segment
from roundtable.common.config.settings import Settings
from roundtable.common.model.tensor_bytes import to_frame
from roundtable.common.protocol.effects import Send
from roundtable.common.protocol.messages.gradients import Pull, Push, Weights, WeightsCredit
from roundtable.common.protocol.messages.setup import InitialWeights, Plan, Setup, Update
from roundtable.common.protocol.model_spec import TensorSpec
from roundtable.ps.server.restoring import make_host

TENSORS = [TensorSpec(f"t{n}", [20_000], "float32", 0) for n in range(4)]  # each is a chunk


class Server:
    def __init__(self) -> None:
        settings = Settings(workers=2, servers=1, global_batch=4, micro_batch=2)
        self.host = make_host(0, settings)
        self.say("worker-0", Setup(TENSORS, Update("SGD", [{"lr": 0.1}])))
        self.say(
            "worker-0", Plan(make_segment(before=None, samples=4, global_batch=4, micro_batch=2, epochs=1, round_limit=None))
        )
        self.say("worker-0", InitialWeights([0, 1, 2, 3]), 4)

    def say(
        self, sender: str, body: Setup | Plan | InitialWeights | Push | Pull | WeightsCredit, frames: int = 0
    ) -> list[list[int]]:
        """The chunks of each message with weights that comes of it."""
        effects = self.host.handle(sender, body, [to_frame(torch.ones(20_000))] * frames, 0.0)
        return list(chunks_in(effects))

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
    assert server.say("worker-0", WeightsCredit(1, [3])) == [[2]]
    assert server.push(1, 0) == [[0]]
    assert server.push(1, 1) == [[1]]


def test_what_is_next_goes_before_what_is_needed_later(server: Server) -> None:
    assert [server.push(1, chunk) for chunk in (0, 2, 3)] == [[[0]], [], []]
    assert server.push(1, 1) == [[1, 2, 3]]
