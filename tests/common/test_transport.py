"""How many connections a process may have, and messages of too many frames."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zmq

from roundtable.common.protocol.transport import MAX_FRAMES, allow_files, dealer, receive, router
from roundtable.common.runtime.errors import UsageError, WireError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("soft", "hard", "least", "most"),
    [
        (1024, 4096, 4096, 4096),  # as far as the system allows, for strangers have connections too
        (1024, 1 << 20, 5000, 6000),
        (1024, 1200, 1500, 1500),  # where that is not enough, it is tried all the same: root may
        (1 << 20, 1 << 20, None, None),
    ],
)
def test_the_limit_of_open_files_leaves_room_for_strangers(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, least: int | None, most: int | None
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda what: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda what, limits: asked.append(limits))
    allow_files(1000)
    if least is None or most is None:
        assert asked == []
    else:
        assert len(asked) == 1 and least <= asked[0][0] <= most and asked[0][1] == max(hard, asked[0][0])


def test_a_limit_that_is_enough_for_the_run_is_no_error_where_it_cannot_be_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(what: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda what: (2000, 2000))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    allow_files(1000)


def test_a_limit_that_cannot_be_raised_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(what: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    with pytest.raises(UsageError, match=r"^a process here needs \d+ open files .*, and the system allows 4096: "):
        allow_files(10_000)


def test_a_message_of_too_many_frames_is_refused_and_the_next_one_is_whole() -> None:
    context: zmq.Context[Any] = zmq.Context()
    try:
        sock, address = router(context, "tcp://127.0.0.1:0")
        peer = context.socket(zmq.DEALER)
        peer.connect(address)
        peer.send_multipart([b""] * 50_000)
        peer.send_multipart([b"x"] * (MAX_FRAMES - 1))
        assert sock.poll(10_000)
        with pytest.raises(WireError, match=r"a message has 50001 frames; 4096 are allowed") as raised:
            receive(sock)
        assert raised.value.kind == "oversized"
        assert sock.poll(10_000)
        whole = receive(sock)
        assert whole is not None and [frame.bytes for frame in whole[1:]] == [b"x"] * (MAX_FRAMES - 1)
        assert receive(sock) is None
    finally:
        context.destroy(linger=0)


def test_nobody_can_foresee_the_names_that_a_listener_gives_to_connections() -> None:
    """libzmq counts them from a number of the C library, which is the same in every process unless that is seeded."""
    code = (
        "import zmq; from roundtable.common.protocol.transport import dealer, receive, router; c = zmq.Context(); "
        "s, address = router(c, 'tcp://127.0.0.1:0'); d = dealer(c, address); d.send(b''); s.poll(5000); "
        "print(receive(s)[0].bytes.hex()); c.destroy(linger=0)"
    )
    seen = {
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    }
    assert len(seen) == 3 and all(len(name.strip()) == 10 for name in seen)


@pytest.mark.parametrize("bind", ["tcp://*:0", "tcp://[::]:0"])
def test_who_listens_at_all_addresses_does_so_by_both_protocols(bind: str) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        sock, bound = router(context, bind)
        if "[" not in bound:
            pytest.skip("this host has no IPv6")
        for host in ("127.0.0.1", "[::1]", "localhost"):
            asker = dealer(context, f"tcp://{host}:{bound.rpartition(':')[2]}")
            asker.send(b"here")
            assert sock.poll(20_000) and sock.recv_multipart()[1] == b"here"
    finally:
        context.destroy(linger=0)
