"""Messages of the key-value store, between a worker and a server."""

from __future__ import annotations

from typing import Literal

from roundtable.common.config.field_types import Count, Name
from roundtable.common.protocol.messages.base import Body


class KvPush(Body, frozen=True):
    """Add a block to `key`, or set it.

    The push counts when all its blocks are here.
    """

    #: Makes the block count once, however often it is sent.
    id: Count
    key: Name
    block: Count
    #: Elements of the whole push.
    numel: Count
    dtype: Name
    op: Literal["add", "set"]
    #: The number of the push.
    push: Count


class KvPull(Body, frozen=True):
    """Send the value of `key`, which has `numel` elements."""

    id: Count
    key: Name
    numel: Count


class KvReply(Body, frozen=True):
    """The block is here. To a pull, the server sends a message for each block, with the block's bytes in a frame."""

    id: Count
    #: Counts the pushes applied to the key.
    version: Count
    dtype: Name = ""
    block: Count = 0
