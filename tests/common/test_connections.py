"""Peers that do not read, or whose connection is half open, over real sockets."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from common import connections
from common.connections import Inflow, Outflow
from common.refusals import Refusals

MIB = 1 << 20


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.destroy(linger=0)


def listening(context: zmq.Context[Any], name: bytes, peers: int) -> tuple[Any, list[Any]]:
    """A ROUTER, and so many DEALERs that it knows, called `name` and a number."""
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    dealers = []
    for number in range(peers):
        dealers.append(context.socket(zmq.DEALER))
        dealers[-1].setsockopt(zmq.ROUTING_ID, name + b"%d" % number)
        dealers[-1].setsockopt(zmq.RCVHWM, 1)
        dealers[-1].connect(f"tcp://127.0.0.1:{port}")
        dealers[-1].send(b"here")
        router.recv_multipart()
    return router, dealers


def test_a_peer_that_does_not_read_is_sent_no_more_than_a_bound_until_it_does(
    context: zmq.Context[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_UNREAD_BYTES", 64 * MIB)
    refusals = Refusals(logging.getLogger("test"))
    router, (slow, quick) = listening(context, b"peer-", 2)
    outflow = Outflow(refusals)
    for _ in range(120):
        outflow.send(router, b"header", [bytes(MIB)], b"peer-0", 0.0)
    refused = refusals.counts["unread"]
    assert 20 <= refused <= 120 - 64  # the kernel takes some
    outflow.send(router, b"header", [b"to another"], b"peer-1", 0.0)
    assert quick.recv_multipart()[-1] == b"to another" and refusals.counts["unread"] == refused
    for _ in range(120 - refused):  # nothing of what was taken is lost
        assert slow.poll(5000) and len(slow.recv_multipart()[-1]) == MIB
    deadline = time.monotonic() + 10
    while not outflow._has_room(b"peer-0"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    outflow.send(router, b"header", [b"again"], b"peer-0", 0.0)
    assert slow.poll(5000) and slow.recv_multipart()[-1] == b"again"
    assert refusals.counts["unread"] == refused


def test_a_connection_that_is_half_open_is_let_be_and_forgotten_when_it_ends(context: zmq.Context[Any]) -> None:
    router, (dealer,) = listening(context, b"peer-", 1)
    refusals = Refusals(logging.getLogger("test"))
    inflow = Inflow(router, refusals)
    host, port = "127.0.0.1", int(router.getsockopt(zmq.LAST_ENDPOINT).rpartition(b":")[2])
    closed, silent = (socket.create_connection((host, port)) for _ in range(2))
    now = 0.0

    def look(count: int) -> None:
        nonlocal now
        deadline = time.monotonic() + 10
        while len(inflow._connections) != count:
            assert time.monotonic() < deadline, f"{len(inflow._connections)} connections"
            now += 1.0
            inflow.look(now)
            time.sleep(0.01)

    look(2)  # that of the dealer was there before
    closed.shutdown(socket.SHUT_WR)  # it sends no more, and still reads
    look(1)
    silent.close()
    look(0)
    dealer.send(b"still here")
    assert router.poll(5000) and router.recv_multipart()[-1] == b"still here"
    assert refusals.counts == {}
    closed.close()
    inflow.close()
