"""Attacks of a stranger with messages that the run must not take."""

from __future__ import annotations

import struct

import msgspec

from benchmarks.attacks.target import NOBODY, Target, header_of, of_unknown_rounds, push_of, say
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.gradients import Pull
from roundtable.common.protocol.messages.session import Goodbye, MembersLost, Stop
from roundtable.common.protocol.transport import PROTOCOL


def _bodies() -> list[Body]:
    return [Goodbye("x"), Pull(1), push_of(1, 0), Stop(True), MembersLost(9, ["worker-0"])]


def colliding(target: Target) -> None:
    """Send maps whose keys are arrays of -1 and -2, which all have one hash: decoding one takes the square of its size."""
    pairs = b"".join(b"\x9a" + bytes(0xFF - (n >> bit & 1) for bit in range(10)) + b"\xc0" for n in range(1 << 10))
    bomb = msgspec.Raw(b"\xdf" + struct.pack(">I", 40 << 10) + pairs * 40)
    body = {
        "type": "Push",
        "round": 0,
        "lo": 0,
        "hi": 1,
        "samples": 1,
        "micro_batches": 1,
        "chunks": [],
        "present": [],
        "hypers": [bomb],
    }
    small = msgspec.Raw(b"\xdf" + struct.pack(">I", 3 << 10) + pairs * 3)
    hello = {"type": "Hello", "role": "worker", "arithmetic": small}
    said = [(run, sender, body) for run in (target.run, "") for sender in (NOBODY, "worker-0", "server-0")]
    for run, sender, what in [*said, ("", "worker", hello)]:
        say(target.address, [[msgspec.msgpack.encode([PROTOCOL, run, sender, 7, 0, what])]])


def made_up_names(target: Target) -> None:
    """Send thousands of names that future workers may get."""
    pull = Pull(0)
    say(target.address, [[header_of(target, pull, f"worker-{number}")] for number in range(3000)])


def unknown_senders(target: Target) -> None:
    names = ("", "nobody", "worker-00", "worker-0", "worker-1", "server-0", "server-7", "coordinator", "\0" * 99)
    say(target.address, [[header_of(target, body, sender)] for body in _bodies() for sender in names])


def unknown_rounds(target: Target) -> None:
    say(target.address, [[header_of(target, body), bytes(4)] for body in of_unknown_rounds(target)])


def another_run(target: Target) -> None:
    pairs = [(sender, run) for sender in ("worker-0", NOBODY) for run in ("", "x")]
    say(target.address, [[header_of(target, body, sender, run)] for body in _bodies() for sender, run in pairs])


def another_protocol(target: Target) -> None:
    others = (PROTOCOL - 1, PROTOCOL + 1, 1 << 60)
    say(target.address, [[header_of(target, body, protocol=other)] for body in _bodies() for other in others])
