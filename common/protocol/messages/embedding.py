"""Messages of embedding rows between a worker and a server. common/model/sparse_rows.py says how their frames are cut."""

from __future__ import annotations

from roundtable.common.config.field_types import Amount, Count, CountOrNone, Hypers, Many
from roundtable.common.config.weights import Weighed
from roundtable.common.protocol.messages.base import Body


class InitialRows(Body, frozen=True):
    """First values of this server's rows of page `page`, in order. Only the first copy counts. Answered by Accepted."""

    id: Count
    #: Sharded layers are counted after the embedding tables.
    table: Count
    page: Count


class RowPull(Body, frozen=True):
    """Send embedding rows as they are at the beginning of round `version`. Their sorted ids follow, all of this server.

    If each push is applied at once, or the server has not kept that version, it sends the rows as they are now.
    """

    #: The answer has the same number.
    number: Count
    table: Count
    version: Count
    count: Count = 0


class Rows(Body, frozen=True):
    """The answer to RowPull `number`: `count` rows."""

    number: Count
    count: Count


class RowPush(Weighed, Body, frozen=True):
    """The sum over micro-batches lo..hi-1 of `round` (gradient x weight) for this server's rows of all tables.

    For each table, sorted ids follow, and then values.
    """

    round: Count
    lo: Count
    hi: Count
    samples: Count
    #: The number of rows of each table. None may be there.
    counts: Many[CountOrNone]
    base_version: Count = 0
    hypers: Many[Hypers] = []
    finite: bool = True
    #: As in Push.
    weight: Amount | None = None


class RowAck(Body, frozen=True):
    """This RowPush need not be sent again."""

    round: Count
    lo: Count
    hi: Count
