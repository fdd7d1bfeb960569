"""Numbers that only the coordinator can make, and by which a name is known to be its bearer's.

The coordinator has a key, which it tells the servers. A worker gets the ticket of its name with its Welcome, and writes it on all
that it sends to servers. So nobody else can speak under that name, and servers need no list of names. A server's incarnation is a
secret that it shares with the coordinator and the other servers. Workers are told a ticket made of it, which says no more than
that the server is another process than before.
"""

from __future__ import annotations

import hmac

import msgspec

from roundtable.common.config.batch_plan import Segment

KEY_BYTES = 32
#: Of a ticket: as many as an incarnation has.
_BYTES = 6


def ticket(key: bytes, text: str) -> int:
    """The number that goes with `text`."""
    return int.from_bytes(hmac.digest(key, text.encode(), "sha256")[:_BYTES], "little")


def seal(key: bytes, segment: Segment) -> int:
    """By which servers know a plan that the coordinator has agreed to."""
    return ticket(key, f"plan {msgspec.json.encode(segment).decode()}")
