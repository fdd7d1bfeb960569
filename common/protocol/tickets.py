"""Numbers that only the coordinator can make. They prove a process's name.

The coordinator shares a key with the servers. A worker gets the ticket of its name with its Welcome, and writes it on all
messages to servers. So no other process can use that name, and servers need no list of names. A server's incarnation is a
secret that it shares with the coordinator and the other servers. Workers get a ticket made from it, which only shows whether
the server is a new process.
"""

from __future__ import annotations

import hmac

import msgspec

from roundtable.common.config.batch_plan import Segment

KEY_BYTES = 32
#: Bytes of a ticket: as many as an incarnation has.
_BYTES = 6


def ticket(key: bytes, text: str) -> int:
    """Return the ticket of `text`."""
    return int.from_bytes(hmac.digest(key, text.encode(), "sha256")[:_BYTES], "little")


def seal(key: bytes, segment: Segment) -> int:
    """Return the seal by which servers recognise a plan that the coordinator has accepted."""
    return ticket(key, f"plan {msgspec.json.encode(segment).decode()}")
