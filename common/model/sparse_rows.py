"""Embedding rows: the server of each row, contributions to some rows, and their addition.

Parameter servers were first made for row-sparse parameters (Li et al., "Scaling Distributed Machine Learning with the Parameter
Server", OSDI 2014). A batch touches few rows of an embedding, so only those are pulled, pushed and updated. Rows are spread
over the servers in blocks, because in many data sets the first ids are the frequent ones. No computation on rows depends on
their server, so the bits do not either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from roundtable.common.config.batch_plan import derive_seed
from roundtable.common.model.layout import CHUNK_BYTES
from roundtable.common.model.row_pages import BLOCK, page_rows
from roundtable.common.model.tensor_bytes import dtype_of, from_frame, to_frame
from roundtable.common.protocol.model_spec import ShardedLayerSpec, TableSpec
from roundtable.common.protocol.transport import Frames
from roundtable.common.runtime.errors import WireError

# ---- the places of rows


def owner_of(ids: torch.Tensor, servers: int) -> torch.Tensor:
    """Return the server of each row (int64, like `ids`)."""
    return ids.div(BLOCK, rounding_mode="floor") % servers


def local_of(ids: torch.Tensor, servers: int) -> torch.Tensor:
    """Return the place of each row among those of its server, int64. It grows with the id."""
    return ids.div(BLOCK * servers, rounding_mode="floor") * BLOCK + ids % BLOCK


def id_of(places: torch.Tensor, server: int, servers: int) -> torch.Tensor:
    """Return the ids of the rows in these places of `server`, int64."""
    blocks = places.div(BLOCK, rounding_mode="floor") * servers + server
    return blocks * BLOCK + places % BLOCK


def rows_on(server: int, servers: int, rows: int) -> int:
    """Return how many of a table's rows `server` has."""
    rounds, rest = divmod(rows, BLOCK * servers)
    return rounds * BLOCK + min(max(rest - server * BLOCK, 0), BLOCK)


def draw(spec: TableSpec, seed: int, block: int, rows: torch.Tensor) -> None:
    """Write the first values of a block to `rows`. They depend on the run's seed, the table and the block alone."""
    assert spec.std is not None
    generator = torch.Generator().manual_seed(derive_seed(seed, f"rows of {spec.name}", block))
    if isinstance(spec, ShardedLayerSpec):
        rows.uniform_(-spec.std * 3**0.5, spec.std * 3**0.5, generator=generator)
    else:
        rows.normal_(0.0, spec.std, generator=generator)


def page_ids(spec: TableSpec, page: int) -> torch.Tensor:
    """Return the ids of the rows of a page, in order."""
    size = page_rows(spec)
    return torch.arange(page * size, min((page + 1) * size, spec.rows))


# ---- contributions


@dataclass(frozen=True)
class RowSum:
    """A contribution to some rows of a table, or a sum of several.

    `values` (N, dim), float32, are for the sorted, distinct `ids` (N), int64. Neither is ever written to. `used`: the table had a
    gradient, though perhaps none for any row here.
    """

    ids: torch.Tensor
    values: torch.Tensor
    used: bool = True

    @property
    def count(self) -> int:
        """The number of rows in messages: -1 if the table had no gradient."""
        return len(self.ids) if self.used else -1


def no_rows(spec: TableSpec, used: bool = False) -> RowSum:
    """Return a contribution without rows, by default of a worker that has not used the table."""
    return RowSum(torch.empty(0, dtype=torch.int64), torch.empty(0, spec.dim), used)


#: A contribution to every table, in the tables' order.
RowSums = Sequence[RowSum]


def add_rows(left: RowSum, right: RowSum) -> RowSum:
    """Return left plus right, row by row. A row that only one side has is taken from that side."""
    used = left.used or right.used
    if not len(left.ids) or not len(right.ids):
        one = right if len(right.ids) else left
        return RowSum(one.ids, one.values, used)
    ids, at = torch.cat([left.ids, right.ids]).unique(return_inverse=True)
    values = torch.full((len(ids), left.values.shape[1]), -0.0)  # adding to -0.0 keeps every bit; adding to 0.0 does not
    values.index_add_(0, at[: len(left.ids)], left.values)
    values.index_add_(0, at[len(left.ids) :], right.values)
    return RowSum(ids, values, used)


def add_tables(left: RowSums, right: RowSums) -> RowSums:
    """Return `add_rows` of each table."""
    return [add_rows(a, b) for a, b in zip(left, right, strict=True)]


# ---- frames


def cut(tensor: torch.Tensor) -> list[memoryview]:
    """Return the bytes of a contiguous tensor as frames of up to a chunk's size. An empty tensor has no frames."""
    whole = to_frame(tensor)
    return [whole[start : start + CHUNK_BYTES] for start in range(0, len(whole), CHUNK_BYTES)]


def join(frames: Iterator[Any], dtype: str, numel: int, what: str) -> torch.Tensor:
    """Return the flat tensor of `numel` elements from the next frames of `cut`, and take these out of the iterator.

    Do not write to it. Raises WireError with `what` if the frames have another number of bytes.
    """
    parts = []
    step = CHUNK_BYTES // dtype_of(dtype).itemsize
    for start in range(0, numel, step):
        frame = next(frames, None)
        if frame is None:
            raise WireError(f"{what} is incomplete")
        parts.append(from_frame(frame, dtype, min(step, numel - start), what))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype_of(dtype))


def cut_sums(sums: RowSums) -> list[memoryview]:
    """Return the frames of a contribution: for each table, ids and values."""
    return [frame for part in sums for tensor in (part.ids, part.values) for frame in cut(tensor)]


def join_sums(frames: Frames, counts: Sequence[int], tables: Sequence[TableSpec], what: str) -> RowSums:
    """Return a contribution from its frames. Raises WireError with `what` unless they are as `counts` says."""
    if len(counts) != len(tables) or any(count < -1 for count in counts):
        raise WireError(f"{what} has rows for {len(counts)} tables, but there are {len(tables)}")
    left, sums = iter(frames), []
    for count, spec in zip(counts, tables, strict=True):
        ids = join(left, "int64", count, what)
        values = join(left, "float32", max(count, 0) * spec.dim, what).view(-1, spec.dim)
        sums.append(RowSum(ids, values, count >= 0))
    if next(left, None) is not None:
        raise WireError(f"{what} has too many frames")
    return sums


def split(sums: RowSums, servers: int) -> list[RowSums]:
    """Return the part of a contribution that belongs to each server."""
    if servers == 1:
        return [sums]
    masks = [[owner_of(part.ids, servers) == server for part in sums] for server in range(servers)]
    return [[RowSum(p.ids[m], p.values[m], p.used) for p, m in zip(sums, of, strict=True)] for of in masks]
