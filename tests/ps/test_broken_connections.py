"""If one connection of a worker breaks, the server sends by the other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq

from roundtable.common.protocol.effects import Send
from roundtable.common.protocol.messages.gradients import Ack, Weights
from roundtable.common.protocol.transport import dealer
from roundtable.ps.server.server import _Server


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    made: zmq.Context[Any] = zmq.Context()
    yield made
    made.destroy(linger=0)


def test_tensors_go_by_the_connection_that_is_left(context: zmq.Context[Any]) -> None:
    server = _Server(context, "tcp://127.0.0.1:1", "tcp://127.0.0.1:0", 0)
    address = server._workers.getsockopt_string(zmq.LAST_ENDPOINT)
    small, bulk = dealer(context, address), dealer(context, address)
    for is_bulk, sock in ((False, small), (True, bulk)):
        sock.send(b"")
        server._connections.routes["worker-0", is_bulk] = server._workers.recv_multipart()[0]
    weights = Send("worker-0", Weights(1, 1, [0]), [b"values"])

    def got(sock: zmq.Socket[bytes]) -> str:
        header, *_ = sock.recv_multipart()
        return str(msgspec.msgpack.decode(header)[5]["type"])

    server._do([weights, Send("worker-0", Ack(1, 0, 1, [0]))])
    assert (got(bulk), got(small)) == ("Weights", "Ack")
    bulk.close(linger=0)
    until = time.monotonic() + 10
    while not small.poll(20) and time.monotonic() < until:
        server._do([weights])
    assert got(small) == "Weights"
    assert server._connections.routes.keys() == {("worker-0", False)}
    small.close(linger=0)
    while server._connections.routes and time.monotonic() < until:
        server._do([weights])
        time.sleep(0.02)
    assert not server._connections.routes  # and nothing is raised
