"""Attacks of a stranger with bytes and frames that are not messages."""

from __future__ import annotations

import os
import random
import struct
import time

from benchmarks.attacks.target import (
    CHUNKS,
    DOUBLE,
    GREETING,
    HALF,
    LAST,
    MORE,
    READY,
    ROUNDS,
    STAY_S,
    Target,
    header_of,
    open_peer,
    open_plain,
    push_of,
    say,
)
from roundtable.common.protocol.transport import MAX_FRAME_BYTES, MAX_FRAMES, MAX_HEADER_BYTES


def truncated(target: Target) -> None:
    header = header_of(target, push_of(target.round(), 0))
    say(target.address, [[header[: len(header) * part // 10]] for part in range(10)])
    with open_peer(target, LAST + struct.pack(">Q", 1000), header):
        pass


def garbage(target: Target) -> None:
    sizes = [0, 1, 9, 300, 10_000]
    say(target.address, [[b"\x91" * 100_000], *([os.urandom(size), os.urandom(size)] for size in sizes)])
    for begin in (b"", GREETING, GREETING + READY):
        with open_plain(target, begin, os.urandom(random.choice(sizes))):
            pass
    with open_peer(target, os.urandom(random.choice(sizes))):
        pass


def oversized(target: Target) -> None:
    say(target.address, [[bytes(MAX_HEADER_BYTES + 1)], [b"x"] * (MAX_FRAMES + 1)])
    for size in (MAX_FRAME_BYTES + 1, (1 << 64) - 1):
        with open_peer(target, LAST + struct.pack(">Q", size), bytes(1 << 16)):
            time.sleep(STAY_S / 10)


def endless(target: Target) -> None:
    """Send a message in which every frame announces another one."""
    frame = MORE + struct.pack(">Q", 1 << 20) + bytes(1 << 20)
    with open_peer(target) as sock:
        for _ in range(200):
            sock.sendall(frame)


def misshapen(target: Target) -> None:
    """Send gradients as a stranger that knows the run's id: too short, of two or eight bytes a number, too many or too few.

    A gradient that fits would count, because a stranger that knows the id may as well join."""
    begin, messages = target.round(), []
    for round_ in range(begin, begin + ROUNDS):
        header = header_of(target, push_of(round_, random.randrange(CHUNKS)))
        messages.append([header, *[[], [bytes(3)], [bytes(HALF)], [bytes(DOUBLE)], [bytes(4)] * 2][round_ % 5]])
    say(target.address, messages)


def empty_frames(target: Target) -> None:
    """Send a message of three million frames without a byte, six megabytes in all."""
    with open_peer(target) as sock:
        sock.sendall(b"\x01\x00" * 3_000_000 + b"\x00\x00")
        time.sleep(STAY_S)
