"""Messages of the key-value store, between a worker and a server."""

from __future__ import annotations

from typing import Literal

from roundtable.common.config.field_types import Count, Name
from roundtable.common.protocol.messages.base import Body


class KvPush(Body, frozen=True):
    """Block `block` of what is added to `key`, or what it is set to: of push number `push`, which has `numel` elements in all its
    blocks and counts when they are here. `id` makes the block count once, however often it is sent."""

    id: Count
    key: Name
    block: Count
    numel: Count
    dtype: Name
    op: Literal["add", "set"]
    push: Count


class KvPull(Body, frozen=True):
    """Send the value of `key`, which has `numel` elements."""

    id: Count
    key: Name
    numel: Count


class KvReply(Body, frozen=True):
    """The block is here; to a pull, a frame follows with the bytes of block `block`, one of as many messages as there are blocks.
    `version` counts the pushes applied to the key."""

    id: Count
    version: Count
    dtype: Name = ""
    block: Count = 0
