"""A server's embedding rows of each table. torch.optim's own optimizers update the rows that a round has touched.

An update is "lazy" as that of torch.optim.SparseAdam: a row that no sample of the round looked up keeps its values and its state.
Adam's bias correction counts the rounds in which the table had a gradient, as in SparseAdam. Everything else is as in the class
that the script names. Adam adds its eps after the correction of the second moment, and SparseAdam before it. So if gradients are
not far above eps, the first rounds' steps are larger than SparseAdam's with the same eps.

If servers draw the first values, they draw a block when one of its rows is first asked for. So a table takes memory and time as
it is used.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from roundtable.common.model.layout import Layout
from roundtable.common.model.row_pages import BLOCK, page_rows, pages
from roundtable.common.model.sparse_rows import RowSum, RowSums, cut, draw, join, join_sums, local_of, owner_of, page_ids, rows_on
from roundtable.common.model.tensor_bytes import ALIGNED
from roundtable.common.protocol.messages.embedding import RowPull, RowPush
from roundtable.common.protocol.messages.replication import ReplicateRows
from roundtable.common.protocol.messages.setup import Update
from roundtable.common.protocol.model_spec import TableSpec
from roundtable.common.protocol.transport import Frames
from roundtable.common.runtime.errors import WireError
from roundtable.common.storage.tensor_file import Entry, TensorFiles
from roundtable.ps.params.clipping import Norm
from roundtable.ps.params.optimizer_classes import class_named, with_tuples
from roundtable.ps.params.planned_rates import of_group
from roundtable.ps.params.state_part import Part

#: Settings of torch.optim that choose a kernel. They are ignored: with them the last bit may depend on the number of rows.
_HOW = ("foreach", "fused")
_CPU = torch.device("cpu")


class Rows:
    """A server's rows of one table, (N, dim), float32, and the optimizer's state of the same shape.

    Both are on `device`. Arguments may be on any device. Tensors for files and other servers are on the CPU.
    """

    def __init__(self, spec: TableSpec, server: int, servers: int, seed: int, device: torch.device = _CPU) -> None:
        self.spec = spec
        self.device = device
        self._server, self._servers, self._seed = server, servers, seed
        self._values = zeros(rows_on(server, servers, spec.rows), spec.dim, device)
        #: By block of rows: True once its first values are drawn. None if a worker sends the first values.
        self._drawn = torch.zeros(-(-len(self._values) // BLOCK), dtype=torch.bool) if spec.std is not None else None
        #: The optimizer's state of the rows' shape (N, dim).
        self._state: dict[str, torch.Tensor] = {}
        #: The rest of the optimizer's state, such as the number of steps.
        self._common: dict[str, Any] = {}

    def on_page(self, page: int) -> torch.Tensor:
        """Return the places of this server's rows of a page, in order."""
        ids = page_ids(self.spec, page)
        return local_of(ids[owner_of(ids, self._servers) == self._server], self._servers)

    def load(self, at: torch.Tensor, values: torch.Tensor) -> None:
        """Set the first values (N, dim) of the rows in the places `at`."""
        self._values.index_copy_(0, at.to(self.device), values.to(self.device))

    def _draw(self, blocks: torch.Tensor) -> None:
        """Draw the first values of the blocks that lack them. The CPU draws them, so they are the same on every device."""
        if self._drawn is None or self.spec.std is None:
            return
        for block in blocks[~self._drawn[blocks]].tolist():
            into = self._values[block * BLOCK : (block + 1) * BLOCK]
            drawn = into if self.device.type == "cpu" else torch.empty(into.shape)
            draw(self.spec, self._seed, block * self._servers + self._server, drawn)
            if drawn is not into:
                into.copy_(drawn)
        self._drawn[blocks] = True

    def state(self) -> Iterator[Entry]:
        """Yield all tensors for a checkpoint, as views. No update may come before they are written.

        First values may be drawn meanwhile, because they do not depend on when they are drawn.
        """
        prefix, name = self._prefix, self.spec.name
        yield Entry(f"{prefix}/values/{name}", self._values.shape, self._on_cpu(self._values), torch.float32)
        for key, whole in self._state.items():
            yield Entry(f"{prefix}/each-{key}/{name}", whole.shape, self._on_cpu(whole), torch.float32)
        for key, value in self._common.items():
            if value is None:
                continue
            tensor = value.clone() if isinstance(value, torch.Tensor) else torch.tensor(value)
            yield Entry(f"{prefix}/common-{key}/{name}", tensor.shape, [tensor])
        if self._drawn is not None:
            yield Entry(f"{prefix}/drawn/{name}", self._drawn.shape, [self._drawn.clone()])

    def _on_cpu(self, whole: torch.Tensor) -> Iterator[torch.Tensor]:
        """Return a tensor's pages on the CPU, one at a time, so that the whole is never copied."""
        return (page.cpu() for page in whole.split(max(1, page_rows(self.spec))))

    @property
    def _prefix(self) -> str:
        return f"table-{self._server}-of-{self._servers}"

    def parts(self) -> Iterator[Part]:
        """Yield all tensors for another server, as views. No update may come before they have arrived.

        A page without drawn values is left out.
        """
        name, size = self.spec.name, page_rows(self.spec)
        wholes = {"values": self._values} | {f"each-{key}": state for key, state in self._state.items()}
        for key, whole in wholes.items():
            for first in range(0, len(whole), size):
                end = min(first + size, len(whole))
                if self._drawn is None or self._drawn[first // BLOCK : -(-end // BLOCK)].any():
                    yield Part(f"{self._prefix}/{key}/{name}", whole[first:end].cpu(), first)
        for key, value in self._common.items():
            if value is not None:
                tensor = value.clone() if isinstance(value, torch.Tensor) else torch.tensor(value)
                yield Part(f"{self._prefix}/common-{key}/{name}", tensor)
        if self._drawn is not None:
            yield Part(f"{self._prefix}/drawn/{name}", self._drawn.clone())

    def put(self, name: str, first: int, rows: torch.Tensor) -> bool:
        """Store rows that `parts` gave. Return False if this table has no such rows."""
        key = name.removeprefix(f"{self._prefix}/").removesuffix(f"/{self.spec.name}")
        whole = self._values if key == "values" else self._state.get(key.removeprefix("each-"))
        if whole is None or rows.dtype != whole.dtype or rows.shape[1:] != whole.shape[1:] or first + len(rows) > len(whole):
            return False
        whole[first : first + len(rows)] = rows
        return True

    def arrived(self, files: TensorFiles) -> None:
        """Load the tensors that `parts` gave. Their rows are in place already. Raises KeyError if a tensor is missing."""
        name = self.spec.name
        for key, known in self._common.items():
            if known is not None:
                value = files[f"{self._prefix}/common-{key}/{name}"]
                self._common[key] = value.clone() if isinstance(known, torch.Tensor) else type(known)(value.item())
        if self._drawn is not None:
            self._drawn.copy_(files[f"{self._prefix}/drawn/{name}"])

    def restore(self, files: TensorFiles, servers: int) -> Generator[None, None, None]:
        """Load the tensors that `state` gave on `servers` servers, and yield after each page.

        Raises KeyError before the first yield if a tensor is missing.
        """
        name = self.spec.name
        for key, known in self._common.items():
            value = files[f"table-0-of-{servers}/common-{key}/{name}"]
            self._common[key] = value.clone() if isinstance(known, torch.Tensor) else type(known)(value.item())
        wholes = {"values": self._values} | {f"each-{key}": whole for key, whole in self._state.items()}
        drawn = [files[f"table-{old}-of-{servers}/drawn/{name}"] for old in range(servers)] if self._drawn is not None else []
        for page in pages(self.spec):
            ids = page_ids(self.spec, page)
            ids = ids[owner_of(ids, self._servers) == self._server]
            for old in range(servers):
                mine = ids[owner_of(ids, servers) == old]
                if not len(mine):
                    continue
                here, there = local_of(mine, self._servers), local_of(mine, servers)
                first, end = int(there[0]), int(there[-1]) + 1
                for key, whole in wholes.items():
                    rows = files.rows(f"table-{old}-of-{servers}/{key}/{name}", first, end)
                    whole.index_copy_(0, here.to(self.device), rows.index_select(0, there - first).to(self.device))
                if self._drawn is not None:
                    self._drawn[here // BLOCK] = drawn[old][there // BLOCK]
            yield


class RowTable(Rows):
    """A server's rows of one embedding table. Each call reads or updates some of them.

    Invariant: `read` with `before` returns the rows that `read` returned before the last `apply`.
    """

    def __init__(self, spec: TableSpec, server: int, servers: int, update: Update, seed: int) -> None:
        super().__init__(spec, server, servers, seed)
        #: Places of the rows that the last update touched, and their values before it.
        self._undo = torch.empty(0, dtype=torch.int64), torch.empty(0, spec.dim)
        self._optimizer, self._parameter = _optimizer(update, spec)
        for name, first in first_state(update, spec).items():
            if isinstance(first, torch.Tensor) and first.shape == (1, spec.dim):
                self._state[name] = first.repeat(len(self._values), 1) if first.any() else zeros(*self._values.shape)
            else:
                self._common[name] = torch.zeros_like(first) if isinstance(first, torch.Tensor) else first

    def parts(self) -> Iterator[Part]:
        """Yield all tensors for another server, as `Rows.parts` does, and the touched rows as they were before the last update.

        A worker that is still in the round before may ask for these.
        """
        yield from super().parts()
        for key, tensor in zip(("undo-places", "undo-values"), self._undo, strict=True):
            yield Part(f"{self._prefix}/{key}/{self.spec.name}", tensor)

    def arrived(self, files: TensorFiles) -> None:
        super().arrived(files)
        places, values = (files[f"{self._prefix}/{key}/{self.spec.name}"].clone() for key in ("undo-places", "undo-values"))
        self._undo = places, values

    def places(self, ids: torch.Tensor, what: str) -> torch.Tensor:
        """Return the places of the rows `ids`. Raises WireError, with `what`, unless they are sorted, distinct and all here."""
        ordered = bool((ids[1:] > ids[:-1]).all())
        if len(ids) and not (ordered and int(ids[0]) >= 0 and int(ids[-1]) < self.spec.rows and self._has(ids)):
            raise WireError(f"{what} names rows of '{self.spec.name}' that are not sorted, or not on this server")
        return local_of(ids, self._servers)

    def _has(self, ids: torch.Tensor) -> bool:
        return bool((owner_of(ids, self._servers) == self._server).all())

    def read(self, at: torch.Tensor, before: bool = False) -> torch.Tensor:
        """Return a copy (N, dim) of the rows in the places `at`, which are sorted. `before`: as before the last update."""
        self._draw(at.div(BLOCK, rounding_mode="floor").unique_consecutive())
        rows = self._values.index_select(0, at)
        touched, old = self._undo
        if before and len(touched):
            place = torch.searchsorted(touched, at).clamp_(max=len(touched) - 1)
            same = touched[place] == at
            rows[same] = old[place[same]]
        return rows

    def apply(
        self,
        total: RowSum,
        weight: float,
        hypers: Mapping[str, Any],
        lr_scale: float = 1.0,
        factor: torch.Tensor | None = None,
    ) -> None:
        """Update the touched rows with the mean gradient. `total` is its sum, of weight `weight`.

        `hypers` overrides settings of the parameter group. `lr_scale` multiplies its learning rate. `factor` is the clipping
        factor.
        """
        at = local_of(total.ids, self._servers)
        old = self.read(at)
        self._undo = at, old
        if not total.used:
            return
        group, parameter = self._optimizer.param_groups[0], self._parameter
        group.update(with_tuples(hypers))
        rate = group["lr"]
        group["lr"] = rate * lr_scale
        rows = {name: whole.index_select(0, at) for name, whole in self._state.items()}
        parameter.data, parameter.grad = old.clone(), total.values / weight
        if factor is not None:
            parameter.grad.mul_(factor)
        self._optimizer.state[parameter] = {**self._common, **rows}
        self._optimizer.step()
        parameter.grad = None
        group["lr"] = rate
        self._values.index_copy_(0, at, parameter.data)
        for name, whole in self._state.items():
            whole.index_copy_(0, at, rows[name])


class RowTables:
    """All embedding tables on one server. With `keeps_versions` each round makes one update, and `read` knows two versions."""

    def __init__(self, layout: Layout, server: int, update: Update, seed: int, keeps_versions: bool) -> None:
        self._specs = layout.tables
        self._server, self._first_norm = server, len(layout.tensors)
        self._tables = [RowTable(spec, server, layout.servers, update, seed) for spec in layout.tables]
        self._keeps_versions = keeps_versions
        #: Called before an update. When it returns, no checkpoint reads the rows any more.
        self.before_update: Callable[[], object] = lambda: None
        #: The number of updates done.
        self._version = 0

    def __bool__(self) -> bool:
        return bool(self._tables)

    def state(self) -> Iterator[Entry]:
        """Return all tensors of all tables for a checkpoint (see `Rows.state`)."""
        return itertools.chain.from_iterable(table.state() for table in self._tables)

    def restore(self, files: TensorFiles, servers: int, version: int) -> None:
        """Load a checkpoint of `servers` servers, and continue at round `version` (see `Rows.restore`)."""
        self._version = version
        for table in self._tables:
            for _ in table.restore(files, servers):
                pass

    def parts(self) -> Iterator[Part]:
        """Return all tensors of all tables for another server (see `RowTable.parts`)."""
        return itertools.chain.from_iterable(table.parts() for table in self._tables)

    def put(self, name: str, first: int, rows: torch.Tensor) -> bool:
        """Store received rows. Return False if no table has such rows."""
        return any(name.endswith(f"/{table.spec.name}") and table.put(name, first, rows) for table in self._tables)

    def arrived(self, files: TensorFiles, version: int) -> None:
        """Load the tensors that `parts` gave, and continue at round `version` (see `Rows.arrived`)."""
        self._version = version
        for table in self._tables:
            table.arrived(files)

    def awaited(self) -> set[tuple[int, int]]:
        """Return (table, page) of the first values that a worker has to send."""
        return {(number, page) for number, spec in enumerate(self._specs) if spec.std is None for page in pages(spec)}

    def load(self, table: int, page: int, frames: Frames) -> None:
        """Load the first values of a page, which must be one of `awaited`. Raises WireError if they do not fit."""
        one = self._tables[table]
        at, left = one.on_page(page), iter(frames)
        values = join(left, "float32", len(at) * one.spec.dim, f"page {page}").view(len(at), one.spec.dim)
        if next(left, None) is not None:
            raise WireError(f"page {page} has too many frames")
        one.load(at, values)

    def read(self, pull: RowPull, frames: Frames) -> tuple[int, list[memoryview]] | None:
        """Return how many rows `pull` asks for, and their frames. Return None if their version does not exist yet.

        Raises WireError if the pull names rows that are not on this server.
        """
        if not 0 <= pull.table < len(self._tables):
            raise WireError(f"there is no table {pull.table}")
        if self._keeps_versions and pull.version > self._version:
            return None
        one = self._tables[pull.table]
        at = one.places(join(iter(frames), "int64", pull.count, "a question"), "a question")
        rows = one.read(at, before=self._keeps_versions and pull.version == self._version - 1)
        return len(rows), cut(rows)

    def page(self, table: int, page: int) -> torch.Tensor:
        """Return a copy (N, dim) of this server's current rows of a page."""
        one = self._tables[table]
        return one.read(one.on_page(page))

    def receive(self, push: RowPush | ReplicateRows, frames: Frames, what: str) -> RowSums:
        """Return the contribution in a push to all tables. Raises WireError, with `what`, if the push does not fit."""
        sums = join_sums(frames, push.counts, self._specs, what)
        for part, table in zip(sums, self._tables, strict=True):
            table.places(part.ids, what)
        return sums

    def norms(self, total: RowSums, weight: float) -> list[Norm]:
        """Return the 2-norm of the mean gradient of each table's rows here, if it has one.

        Norms number tables after the model's tensors.
        """
        return [
            (self._first_norm + number, self._server, float(torch.linalg.vector_norm(part.values / weight)))
            for number, part in enumerate(total)
            if part.used
        ]

    def apply(
        self,
        total: RowSums,
        weight: float,
        hypers: Sequence[Mapping[str, Any]],
        lr_scale: float = 1.0,
        factor: torch.Tensor | None = None,
    ) -> None:
        """Update the touched rows of all tables (see `RowTable.apply`). `hypers` has one item per parameter group, or none."""
        self.before_update()
        for part, table in zip(total, self._tables, strict=True):
            table.apply(part, weight, of_group(hypers, table.spec.group), lr_scale, factor)
        self._version += 1


def zeros(rows: int, dim: int, device: torch.device = _CPU) -> torch.Tensor:
    """Return zeros (rows, dim), float32.

    On the CPU they take no memory until they are written to. They are aligned as torch's tensors are, because alignment affects
    the last bit of matrix products.
    """
    if device.type != "cpu":
        return torch.zeros(rows, dim, device=device)
    memory = np.zeros(rows * dim + ALIGNED // 4, dtype=np.float32)
    first = -memory.ctypes.data % ALIGNED // 4
    return torch.from_numpy(memory[first : first + rows * dim].reshape(rows, dim))


def _optimizer(update: Update, spec: TableSpec) -> tuple[torch.optim.Optimizer, torch.nn.Parameter]:
    """Return the group's optimizer and its parameter. The caller sets the parameter's memory before each step."""
    parameter = torch.nn.Parameter(torch.zeros(1, spec.dim))
    return optimizer_over(parameter, update, spec.group), parameter


def optimizer_over(parameter: torch.nn.Parameter, update: Update, group: int) -> torch.optim.Optimizer:
    """Return the torch.optim optimizer of a parameter group, for `parameter`."""
    cls = class_named(update.class_of(group))
    settings = {key: value for key, value in with_tuples(update.groups[group]).items() if key not in _HOW}
    known = {key: value for key, value in settings.items() if key in inspect.signature(cls).parameters}
    made: torch.optim.Optimizer = cls([{"params": [parameter], **settings}], **known)
    return made


def first_state(update: Update, spec: TableSpec) -> dict[str, Any]:
    """Return the optimizer state with which a row begins: that after one step with a gradient of zeros."""
    optimizer, parameter = _optimizer(update, spec)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return dict(optimizer.state[parameter])
