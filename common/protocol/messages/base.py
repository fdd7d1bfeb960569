"""The base of all messages.

Tensors never travel inside a message: they follow as raw frames, in the order that the message lists them. Their dtype and
shape come from the agreed layout. A process that waits for an answer asks again until the answer comes. So every request is
idempotent, and every message may be lost, repeated or late. docs/protocol.md says which process sends what, and when.
"""

from __future__ import annotations

import msgspec

from roundtable.common.runtime.errors import printable

_MOST_REASON = 4000


class Body(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Base of all messages."""


def sent_reason(reason: str) -> str:
    """Return the part of `reason` that may be sent, without anything that is not a letter on a terminal or in a log."""
    return printable(reason)[:_MOST_REASON]
