"""Attacks of a stranger with connections."""

from __future__ import annotations

import contextlib
import socket
import struct
import time

import zmq

from benchmarks.attacks.target import GREETING, LAST, READY, STAY_S, Target, header_of, open_peer, open_plain
from roundtable.common.protocol.messages.gradients import Pull

#: Simultaneous connections of a storm.
STORM = 200


#: The first names that libzmq gives to connections of a process's first and second listener, if the C library is not seeded. The
#: second constant is the number of names after these that are chosen.
_UNSEEDED = (0x6B8B4567, 0xE43C9869)
_NAMES = 40
#: Linux: a connection in repair sends nothing when it is closed.
_TCP_REPAIR = 19


def _ready_as(name: bytes) -> bytes:
    """Return `READY` of a peer that has chosen the name of its connection."""
    said = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity" + struct.pack(">I", len(name)) + name
    return b"\x04" + bytes([len(said)]) + said


def chosen_names(target: Target) -> None:
    """Connect with the names that libzmq would give next if the C library were not seeded: libzmq would abort the process."""
    with contextlib.ExitStack() as stack:
        for first in _UNSEEDED:
            for number in range(first, first + _NAMES):
                sock = stack.enter_context(open_plain(target, GREETING))
                sock.recv(len(GREETING), socket.MSG_WAITALL)
                sock.sendall(_ready_as(b"\0" + struct.pack(">I", number)))
        for _ in range(2 * _NAMES):
            stack.enter_context(open_peer(target))


def idle(target: Target) -> None:
    """Open connections that greet as ZeroMQ does, and say nothing else."""
    with contextlib.ExitStack() as stack:
        for _ in range(2 * STORM):
            stack.enter_context(open_peer(target))
        time.sleep(2 * STAY_S)


def web(target: Target) -> None:
    for method in ("GET", "POST", "OPTIONS"):
        with open_plain(target, f"{method} / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n123456789".encode()):
            time.sleep(STAY_S / 10)


def scan(target: Target) -> None:
    """Open connections and close them at once, as port scanners do."""
    for abrupt in (False, True) * 25:
        with open_plain(target) as sock:
            if abrupt:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def slow(target: Target) -> None:
    """Send a byte at a time, and ask without reading the answers."""
    question = header_of(target, Pull(0, full_precision=True))
    with open_peer(target, (b"\x00" + bytes([len(question)]) + question) * 1000), open_plain(target) as slow:
        for byte in (GREETING + READY)[:20]:
            slow.send(bytes([byte]))
            time.sleep(STAY_S / 5)


def half_open(target: Target) -> None:
    """Open connections that never finish their handshake."""
    with contextlib.ExitStack() as stack:
        for n in range(30):
            stack.enter_context(open_plain(target, (b"", GREETING[:10], GREETING)[n % 3]))
        time.sleep(6 * STAY_S)


def vanishing(target: Target) -> None:
    """Open connections and vanish without a word, as by a power cut. Without root rights, close them."""
    for peer in (
        open_plain(target),
        open_plain(target, GREETING),
        open_peer(target),
        open_peer(target, LAST + struct.pack(">Q", 1000) + bytes(9)),
    ):
        with peer as sock, contextlib.suppress(PermissionError):
            time.sleep(STAY_S / 10)
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)


def storm(target: Target) -> None:
    """Open many connections at once. Half are ZeroMQ's."""
    with contextlib.ExitStack() as stack:
        for _ in range(STORM // 2):
            stack.enter_context(open_plain(target))
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            header = header_of(target, Pull(0), "nobody")
            for _ in range(STORM // 2):
                sock = context.socket(zmq.DEALER)
                sock.connect(target.address)
                sock.send(header)
            time.sleep(STAY_S)
        finally:
            context.destroy(linger=0)
