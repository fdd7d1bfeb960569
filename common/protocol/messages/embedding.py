"""Messages of embedding rows between a worker and a server. common/model/sparse_rows.py says how their frames are cut."""

from __future__ import annotations

from roundtable.common.config.field_types import Count, CountOrNone, Hypers, Many
from roundtable.common.protocol.messages.base import Body


class InitialRows(Body, frozen=True):
    """First values of the rows of page `page` that are this server's, in order. Only the first copy counts. Answered by
    Accepted with the same `id`. Classifiers are counted after the tables."""

    id: Count
    table: Count
    page: Count


class RowPull(Body, frozen=True):
    """Send me rows as they are at the beginning of round `version`: those whose ids follow, which are sorted and all on this
    server.

    Where each push is applied at once, and where that version is gone, they are sent as they are now. `number` tells which
    question an answer is for.
    """

    number: Count
    table: Count
    version: Count
    count: Count = 0


class Rows(Body, frozen=True):
    """Answer to RowPull `number`: `count` rows."""

    number: Count
    count: Count


class RowPush(Body, frozen=True):
    """The sum over micro-batches lo..hi-1 of `round` (gradient x samples) for the rows of all tables that are on this server:
    of each table, sorted ids and then values. `counts` are the numbers of rows, which may be none."""

    round: Count
    lo: Count
    hi: Count
    samples: Count
    counts: Many[CountOrNone]
    base_version: Count = 0
    hypers: Many[Hypers] = []
    finite: bool = True


class RowAck(Body, frozen=True):
    """That RowPush needs not be sent again, whatever became of it."""

    round: Count
    lo: Count
    hi: Count
