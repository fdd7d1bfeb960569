"""The parts in which a server sends the trained model to the coordinator, and where their bytes belong in the model's tensors.

Parts depend on the layout alone, so server and coordinator number them alike: first the server's chunks, then the pages of
tables, then the pages of sharded layers. A chunk's bytes are the weights in their own dtype, piece by piece. A page's bytes are
the server's rows of the page, in order. If a sharded layer has a bias, all rows without their biases come first, then the biases.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from roundtable.common.model.layout import Chunk, Layout
from roundtable.common.model.row_pages import pages, runs_on
from roundtable.common.protocol.model_spec import TableSpec

#: Bytes of an element of a table or sharded layer.
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Part:
    """Chunk `number` of the layout, or page `page` of table or sharded layer `number`, and its size in bytes."""

    kind: Literal["chunk", "table", "sharded layer"]
    number: int
    page: int
    bytes: int


@dataclass(frozen=True)
class Span:
    """Bytes `start` .. `start + length - 1` of tensor number `of`. `InFile` defines the numbers."""

    of: int
    start: int
    length: int


def parts_on(layout: Layout, server: int) -> list[Part]:
    """Return all parts of a server, in the order of their numbers."""
    parts = [Part("chunk", chunk.id, 0, chunk.weight_bytes) for chunk in layout.on(server)]
    for kind, specs in (("table", layout.tables), ("sharded layer", layout.sharded_layers)):
        for number, spec in enumerate(specs):
            for page in pages(spec):
                rows = sum(count for _, count in runs_on(spec, page, server, layout.servers))
                if rows:
                    parts.append(Part(kind, number, page, rows * spec.dim * _FLOAT_BYTES))  # type: ignore[arg-type]
    return parts


def spans(layout: Layout, server: int, part: Part) -> Iterator[Span]:
    """Yield the places in the model's tensors to which the bytes of a part belong, in the order of the bytes."""
    tables, sharded_layers = len(layout.tables), len(layout.sharded_layers)
    first = len(layout.tensors)
    if part.kind == "chunk":
        chunk = layout.chunks[part.number]
        size = _element_bytes(chunk)
        yield from (Span(piece.tensor, piece.start * size, piece.length * size) for piece in chunk.pieces)
    elif part.kind == "table":
        spec = layout.tables[part.number]
        yield from _rows(spec, part.page, server, layout.servers, first + part.number, spec.dim)
    else:
        layer = layout.sharded_layers[part.number]
        weight = first + tables + part.number
        yield from _rows(layer, part.page, server, layout.servers, weight, layer.dim - layer.bias)
        if layer.bias:
            yield from _rows(layer, part.page, server, layout.servers, weight + sharded_layers, 1)


def _element_bytes(chunk: Chunk) -> int:
    return chunk.weight_bytes // chunk.numel


def _rows(spec: TableSpec, page: int, server: int, servers: int, of: int, columns: int) -> Iterator[Span]:
    size = columns * _FLOAT_BYTES
    for first, count in runs_on(spec, page, server, servers):
        yield Span(of, first * size, count * size)


def sizes(layout: Layout) -> Sequence[int]:
    """Return the bytes of each tensor. `InFile` defines the order."""
    tensors = [0] * len(layout.tensors)
    for chunk in layout.chunks:
        for piece in chunk.pieces:
            tensors[piece.tensor] += piece.length * _element_bytes(chunk)
    tables = [spec.rows * spec.dim * _FLOAT_BYTES for spec in layout.tables]
    weights = [spec.rows * (spec.dim - spec.bias) * _FLOAT_BYTES for spec in layout.sharded_layers]
    biases = [spec.rows * spec.bias * _FLOAT_BYTES for spec in layout.sharded_layers]
    return [*tensors, *tables, *weights, *biases]
