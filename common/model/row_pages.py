"""Which rows of a table are on which server, in numbers alone. The coordinator needs this without torch."""

from __future__ import annotations

from collections.abc import Iterator

from roundtable.common.model.layout import CHUNK_BYTES
from roundtable.common.protocol.model_spec import TableSpec

#: Number of rows that lie together on one server, and whose first values are drawn together.
BLOCK = 64


def page_rows(spec: TableSpec) -> int:
    """Return the rows of a page, the unit in which whole tables are moved: about a chunk's bytes, in whole blocks."""
    return max(1, CHUNK_BYTES // (4 * spec.dim * BLOCK)) * BLOCK


def pages(spec: TableSpec) -> range:
    """Return the numbers of a table's pages."""
    return range(-(-spec.rows // page_rows(spec)))


def runs_on(spec: TableSpec, page: int, server: int, servers: int) -> Iterator[tuple[int, int]]:
    """Yield the rows of a page that `server` has, as (first row, number of rows) of each run, in order."""
    first, end = page * page_rows(spec), min((page + 1) * page_rows(spec), spec.rows)
    if servers == 1:
        yield first, end - first
        return
    for start in range(first, end, BLOCK):
        if start // BLOCK % servers == server:
            yield start, min(start + BLOCK, end) - start
