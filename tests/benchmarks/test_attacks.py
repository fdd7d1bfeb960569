"""Strangers in the fault matrix do what their rows say, and send overheard messages again unchanged."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from benchmarks.attacks.memory import resident
from benchmarks.attacks.strangers import ITEMS, attacking
from benchmarks.attacks.target import Target
from benchmarks.attacks.wiretap import Wire, replay
from roundtable.common.protocol.transport import Stamp, receive, router
from roundtable.common.runtime.errors import WireError

HERE = Stamp("server-0", "abc")


class Listener:
    """A listening socket, and the headers that have come in by it."""

    def __init__(self) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._sock, address = router(self._context, "tcp://127.0.0.1:0")
        self.target = Target("127.0.0.1", int(address.rpartition(":")[2]), HERE.run, lambda: 0)

    def take(self, seconds: float) -> list[list[bytes]]:
        """Messages that come within so long, without the routing id; one with too many frames is empty."""
        found, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            if self._sock.poll(50):
                try:
                    found.append([frame.bytes for frame in receive(self._sock) or ()][1:])
                except WireError:
                    found.append([])
        return found

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def listener() -> Iterator[Listener]:
    one = Listener()
    yield one
    one.close()


def kind_of(message: list[bytes]) -> str:
    """Under which kind it is refused, be it for its header alone; '' where it is not."""
    if not message:
        return "oversized"
    try:
        HERE.open(message[0]).read()
    except WireError as error:
        return error.kind
    return ""


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("truncated frames", {"malformed"}),
        ("garbage", {"malformed"}),
        ("oversized frames", {"oversized"}),
        ("another run's id", {"run"}),
        ("another version of the protocol", {"protocol"}),
        ("unknown senders", {""}),
        ("gradients of another size or type", {""}),
        ("headers that take long to decode", {"run", "malformed"}),
        ("names that were made up", {""}),
        ("connections with the next one's name", set()),
        ("HTTP requests", set()),
        ("port scans", set()),
        ("handshakes that are never finished", set()),
        ("peers that vanish without a word", set()),
    ],
)
def test_an_item_is_refused_as_what_it_is(listener: Listener, name: str, kinds: set[str]) -> None:
    thread = threading.Thread(target=ITEMS[name].act, args=(listener.target,))
    thread.start()
    found = []
    while thread.is_alive():
        found += listener.take(0.1)
    assert {kind_of(message) for message in found + listener.take(0.3)} == kinds


def test_an_attack_goes_on_though_nobody_listens_until_it_is_over() -> None:
    nobody, began = Target("127.0.0.1", 1, "abc", lambda: 0), time.monotonic()
    with attacking([ITEMS["HTTP requests"], ITEMS["port scans"]], [nobody]):
        time.sleep(0.1)
    assert time.monotonic() < began + 5


def test_there_is_no_memory_of_a_process_that_has_ended() -> None:
    assert resident(os.getpid()) > 1 << 20
    assert resident(1 << 30) == 0


SENDS = """import sys, zmq
context = zmq.Context()
sock = context.socket(zmq.DEALER)
sock.connect(sys.argv[1])
for n in range(200):
    sock.send_multipart([b"%d" % n, memoryview(b"x")], copy=False)
context.destroy(linger=5000)
"""


def send(wire: Wire, listener: Listener) -> list[list[bytes]]:
    """Have another process send 200 messages; those that have come."""
    command = [sys.executable, "-c", SENDS, listener.target.address]
    with subprocess.Popen(command, env={**os.environ, **wire.env}) as process:
        found = listener.take(2.0)
        assert process.wait(timeout=20) == 0
    return found + listener.take(0.2)


@pytest.mark.slow
def test_what_is_overheard_is_sent_again_as_it_was(listener: Listener, tmp_path: Path) -> None:
    wire = Wire(tmp_path / "wire")
    wire.on()
    sent = send(wire, listener)
    wire.off()
    assert sent == [[b"%d" % n, b"x"] for n in range(200)]
    heard = wire.heard()
    assert heard == [(listener.target.address, message) for message in sent]
    replay(heard)
    replay(heard, [listener.target])
    assert sorted(listener.take(1.0)) == sorted(sent * 2)
    assert send(wire, listener) == sent and wire.heard() == heard  # nobody listens any more


def test_what_a_process_that_was_killed_has_written_last_is_left_out(listener: Listener, tmp_path: Path) -> None:
    wire = Wire(tmp_path / "wire")
    wire.on()
    send(wire, listener)
    (file,) = (tmp_path / "wire").glob("*.sent")
    file.write_bytes(file.read_bytes()[:-1])
    assert len(wire.heard()) == 199


@pytest.mark.slow
def test_messages_go_twice_and_after_later_ones(listener: Listener, tmp_path: Path) -> None:
    wire = Wire(tmp_path / "wire", is_unruly=True)
    assert [int(message[0]) for message in send(wire, listener)] == list(range(200))
    wire.on()
    numbers = [int(message[0]) for message in send(wire, listener)]
    assert len(set(numbers)) > 150 and len(numbers) > len(set(numbers)) + 10
    assert sorted(numbers) != numbers
