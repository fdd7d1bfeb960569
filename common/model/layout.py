"""How a model's parameters and buffers are cut into chunks and placed on servers.

The layout depends only on names, shapes, dtypes, groups and the number of servers. Every process computes it and compares
digests. Where tensors are cut does not depend on the number of servers, and so neither do the bits of results.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import msgspec

from roundtable.common.protocol.model_spec import (
    BYTES_OF_ANY,
    DTYPES,
    ELEMENT_BYTES,
    Kind,
    ShardedLayerSpec,
    TableSpec,
    TensorSpec,
    is_trainable,
)
from roundtable.common.runtime.errors import UsageError

#: Largest chunk in bytes. ZeroMQ's high-water mark counts messages, and frames of this size still stream well.
CHUNK_BYTES = 4 << 20
#: Small tensors share chunks of at least so many bytes.
_PACK_BYTES = 64 << 10
#: Most pieces of a chunk. A contribution has one bit for each piece, in one MessagePack integer.
_MOST_PIECES = 64

#: Largest model in bytes. A larger one has more chunks than a process should keep track of.
_MOST_BYTES = 1 << 40


class Piece(msgspec.Struct, frozen=True):
    """Elements start .. start+length-1 of flattened tensor number `tensor`, at `offset` in the chunk.

    If the tensor travels as bytes, an element is a byte.
    """

    tensor: int
    start: int
    length: int
    offset: int


class Chunk(msgspec.Struct, frozen=True, omit_defaults=True):
    """The unit of sending, summing and updating. All pieces have one kind, dtype and group, and all are `frozen` or none is.

    Ids follow the order in which the model registers its tensors. For most models this is the order of the forward, so the next
    forward needs lower ids first.
    """

    id: int
    server: int
    kind: Kind
    group: int
    dtype: str
    pieces: list[Piece]
    frozen: bool = False
    #: A part of a tensor that is updated whole. All such parts are on one server.
    whole: bool = False

    def has_values(self, present: int) -> bool:
        """Return whether a contribution to the pieces `present` has values. Parameters without a gradient have none."""
        return self.kind != "param" or present != 0

    @property
    def numel(self) -> int:
        last = self.pieces[-1]
        return last.offset + last.length

    @property
    def sum_dtype(self) -> str:
        """The dtype of contributions, of their sum, and of the server's weights."""
        return DTYPES[self.dtype][1]

    @property
    def weight_bytes(self) -> int:
        return self.numel * ELEMENT_BYTES[self.dtype]

    @property
    def sum_bytes(self) -> int:
        return self.numel * ELEMENT_BYTES[self.sum_dtype]


def urgency(chunk: Chunk) -> tuple[bool, int]:
    """Return the key that sorts chunks by when the next round needs them: buffers first, then parameters in forward order."""
    return chunk.kind == "param", chunk.id


class Layout(msgspec.Struct, frozen=True, omit_defaults=True):
    """Every tensor of a model, the chunks, and the tables and sharded layers, which are in no chunk."""

    tensors: list[TensorSpec]
    chunks: list[Chunk]
    servers: int
    tables: list[TableSpec] = []
    sharded_layers: list[ShardedLayerSpec] = []

    def on(self, server: int) -> list[Chunk]:
        """Return the chunks on `server`, by id."""
        return [chunk for chunk in self.chunks if chunk.server == server]

    def owners(self) -> list[int]:
        """Return the servers that take part in rounds: 0 with the metrics, and those with a chunk, a table or a sharded layer."""
        if self.tables or self.sharded_layers:
            return list(range(self.servers))
        return sorted({0} | {chunk.server for chunk in self.chunks})

    def digest(self) -> str:
        """Return the SHA-256 of all fields, in hexadecimal."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


def make_layout(
    tensors: Sequence[TensorSpec], servers: int, tables: Sequence[TableSpec] = (), sharded_layers: Sequence[ShardedLayerSpec] = ()
) -> Layout:
    """Return the layout: cut `tensors` into chunks, and place them by bytes on `servers` servers, least loaded first.

    A tensor above CHUNK_BYTES is cut into several chunks. Small ones of one kind, dtype and group share a chunk. The chunks of a
    tensor that is updated whole are on one server, and no other tensor is in them. `tables` and
    `sharded_layers` are not cut. Raises UsageError for a dtype that cannot be trained or sent.
    """
    for spec in tensors:
        _check_dtype(spec)
    total = sum(spec.units * ELEMENT_BYTES[spec.unit] for spec in tensors)
    if total > _MOST_BYTES:
        raise UsageError(f"the model takes {total >> 40} TiB; {_MOST_BYTES >> 40} TiB is the most that can be divided.")
    pack_bytes = min(CHUNK_BYTES, max(_PACK_BYTES, total // 16))
    cuts: list[list[Piece]] = []
    open_cut: dict[tuple[str, str, int, bool], int] = {}
    for index, spec in enumerate(tensors):
        if spec.numel == 0:
            continue
        units, size = spec.units, ELEMENT_BYTES[DTYPES[spec.unit][1]]
        if units * size > CHUNK_BYTES:
            step = CHUNK_BYTES // size
            for start in range(0, units, step):
                cuts.append([Piece(index, start, min(step, units - start), 0)])
            continue
        if spec.whole:
            cuts.append([Piece(index, 0, units, 0)])
            continue
        key = (spec.kind, spec.unit, spec.group, spec.frozen)
        at = open_cut.get(key)
        fits = at is not None and (_end(cuts[at]) + units) * size <= pack_bytes and len(cuts[at]) < _MOST_PIECES
        if at is not None and fits:
            cuts[at].append(Piece(index, 0, units, _end(cuts[at])))
        else:
            open_cut[key] = len(cuts)
            cuts.append([Piece(index, 0, units, 0)])
    chunks = []
    for number, pieces in enumerate(cuts):
        spec = tensors[pieces[0].tensor]
        chunks.append(Chunk(number, 0, spec.kind, spec.group, spec.unit, pieces, spec.frozen, spec.whole))
    return Layout(list(tensors), _place(chunks, servers), servers, list(tables), list(sharded_layers))


def _check_dtype(spec: TensorSpec) -> None:
    """Raise UsageError if a tensor of this kind cannot have its dtype."""
    if spec.is_bytes and spec.dtype in BYTES_OF_ANY:
        return
    if (
        spec.dtype not in DTYPES
        or (spec.kind in ("param", "mean") and not is_trainable(spec.dtype))
        or (spec.kind == "sum" and spec.dtype == "bool")
    ):
        if spec.kind == "param":
            raise UsageError(f"'{spec.name}' has dtype {spec.dtype}; servers can keep {', '.join(DTYPES)}.")
        raise UsageError(f"the buffer '{spec.name}' has dtype {spec.dtype}, which rule '{spec.kind}' cannot merge.")


def _end(pieces: list[Piece]) -> int:
    return pieces[-1].offset + pieces[-1].length


def together(chunks: Iterable[Chunk]) -> list[list[Chunk]]:
    """Return chunks in lists that are placed and updated together: the chunks of a whole tensor, or one other chunk."""
    found: dict[tuple[bool, int], list[Chunk]] = {}
    for chunk in chunks:
        found.setdefault((chunk.whole, chunk.pieces[0].tensor if chunk.whole else chunk.id), []).append(chunk)
    return list(found.values())


def _place(chunks: list[Chunk], servers: int) -> list[Chunk]:
    load = [0] * servers
    server_of: dict[int, int] = {}
    sizes = [(sum(chunk.sum_bytes for chunk in some), some) for some in together(chunks)]
    for size, some in sorted(sizes, key=lambda one: (-one[0], one[1][0].id)):
        server = load.index(min(load))
        server_of |= {chunk.id: server for chunk in some}
        load[server] += size
    return [msgspec.structs.replace(chunk, server=server_of[chunk.id]) for chunk in chunks]


#: In memory, chunks start at multiples of so many bytes, so that each can be mapped by itself. It is a page on every system.
ALIGN_BYTES = 4096


def gradient_offsets(layout: Layout) -> tuple[dict[int, int], int]:
    """Return the byte offset of each chunk's contribution in one memory, by chunk, and the size of that memory.

    The chunks of one tensor lie together without gaps.
    """
    offsets, end = {}, 0
    for chunk in layout.chunks:
        if chunk.pieces[0].start == 0:
            end = _aligned(end)
        offsets[chunk.id] = end
        end += chunk.sum_bytes
    return offsets, _aligned(end)


def weight_offsets(chunks: Iterable[Chunk]) -> tuple[dict[int, int], int]:
    """Return the byte offset of the weights of each of a server's chunks in one memory, by chunk, and the size of that memory."""
    offsets, end = {}, 0
    for chunk in chunks:
        offsets[chunk.id] = end
        end = _aligned(end + chunk.weight_bytes)
    return offsets, end


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN_BYTES) * ALIGN_BYTES


def message_batches(ids: Iterable[int], size: Callable[[int], int]) -> list[list[int]]:
    """Return chunk ids in lists that fill one message by `size`, in bytes: one chunk, or several of a chunk's size together."""
    out: list[list[int]] = []
    room = 0
    for i in ids:
        if not out or size(i) > room:
            out.append([])
            room = CHUNK_BYTES
        out[-1].append(i)
        room -= size(i)
    return out
