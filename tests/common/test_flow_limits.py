"""Peers that do not read, or whose connection is half open, over real sockets."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from roundtable.common.protocol import flow_limits
from roundtable.common.protocol.flow_limits import Inflow, Outflow, Standing
from roundtable.common.protocol.rejections import Rejections

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
    monkeypatch.setattr(flow_limits, "_UNREAD_BYTES", 64 * MIB)
    refusals = Rejections(logging.getLogger("test"))
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
    refusals = Rejections(logging.getLogger("test"))
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


def test_peers_that_do_not_read_have_what_is_beyond_their_own_share_together(
    context: zmq.Context[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_limits, "_OWN_BYTES", 4 * MIB)
    monkeypatch.setattr(flow_limits, "_UNREAD_IN_ALL", 16 * MIB)
    refusals = Rejections(logging.getLogger("test"))
    router, dealers = listening(context, b"peer-", 6)  # which must not be collected before the end
    outflow = Outflow(refusals)
    for _ in range(40):
        for peer in range(len(dealers)):
            outflow.send(router, b"header", [bytes(MIB)], b"peer-%d" % peer, 0.0)
    unread = sum(queue.left() for queue in outflow._under_way.values())
    assert unread <= (6 * 5 + 16 + 1) * MIB and refusals.counts["unread"] > 0


def test_of_more_strangers_than_there_are_files_for_the_oldest_are_shut_and_no_member(
    context: zmq.Context[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_limits, "_files", lambda: 40)
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    refusals = Rejections(logging.getLogger("test"))
    inflow = Inflow(router, refusals)
    members = []
    for standing in (Standing.JOINING, Standing.MEMBER):
        members.append(context.socket(zmq.DEALER))
        members[-1].connect(f"tcp://127.0.0.1:{port}")
        members[-1].send(b"here")
        assert router.poll(5000)
        frames = router.recv_multipart(copy=False)
        inflow.look(1.0)
        inflow.took(frames[1:], standing)
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(30)]
    now, deadline = 1.0, time.monotonic() + 10
    while refusals.counts.get("flood", 0) < 20:
        assert time.monotonic() < deadline
        inflow.look(now := now + 1.0, listening=False)  # then nobody can have said who it is
        assert not refusals.counts or now > 2.0
        inflow.look(now := now + 1.0)
        time.sleep(0.01)
    for stranger in strangers:
        stranger.setblocking(False)
    time.sleep(0.1)
    assert [_is_shut(stranger) for stranger in strangers] == [True] * 20 + [False] * 10
    assert refusals.counts == {"flood": 20}
    for member in members:
        member.send(b"still here")
        assert router.poll(5000) and router.recv_multipart()[-1] == b"still here"
    inflow.close()
    members[0].send(b"late")  # as the coordinator still listens while it says that the run is over
    assert router.poll(5000)
    inflow.took(router.recv_multipart(copy=False)[1:], Standing.MEMBER)
    for stranger in strangers:
        stranger.close()


def _is_shut(sock: socket.socket) -> bool:
    """Whether the other end has closed a connection by which it has sent no more than ZeroMQ's greeting."""
    while True:
        try:
            if not sock.recv(1 << 16):
                return True
        except BlockingIOError:
            return False
        except ConnectionError:
            return True
