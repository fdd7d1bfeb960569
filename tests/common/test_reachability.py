"""Addresses that cannot be reached are known, and only those."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import zmq

from roundtable.common.network.reachability import Reachability
from roundtable.common.protocol.transport import dealer, router
from roundtable.common.runtime.errors import UsageError

PATIENCE_S = 0.5


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.destroy(linger=0)


def until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20.0
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def listening_again(context: zmq.Context[zmq.Socket[bytes]], address: str) -> zmq.Socket[bytes]:
    """A socket at an address that ZeroMQ may not have given back yet."""
    found: list[zmq.Socket[bytes]] = []

    def listens() -> bool:
        with contextlib.suppress(UsageError):
            found.append(router(context, address)[0])
        return bool(found)

    until(listens)
    return found[0]


def test_who_listens_is_reached_and_no_longer_when_it_is_gone(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    sock, address = router(context, "tcp://127.0.0.1:0")
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))  # and does not listen
    nowhere = f"tcp://127.0.0.1:{closed.getsockname()[1]}"
    reach, began = Reachability(), time.monotonic()
    for name, where in (("server-0", address), ("server-1", nowhere)):
        dealer(context, where, partial(reach.watch, name, where, began))

    def unreached() -> dict[str, str]:
        return reach.unreached(time.monotonic(), PATIENCE_S)

    assert unreached() == {}
    until(lambda: "server-1" in unreached())
    assert time.monotonic() >= began + PATIENCE_S
    until(lambda: unreached() == {"server-1": nowhere})
    sock.close(linger=0)
    until(lambda: unreached() == {"server-0": address, "server-1": nowhere})
    reach.forget("server-1")
    until(lambda: unreached() == {"server-0": address})
    again = listening_again(context, address)
    until(lambda: unreached() == {})
    again.close(linger=0)
    closed.close()


def test_one_that_listens_and_does_not_speak_is_not_reached(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        reach = Reachability()
        dealer(context, address, partial(reach.watch, "server-0", address, time.monotonic()))
        until(lambda: reach.unreached(time.monotonic(), PATIENCE_S) == {"server-0": address})
