"""A server's part of the model: the numbers, where its weights lie, and which first weights are still to come."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch

from roundtable.common.model.layout import make_layout
from roundtable.common.model.sparse_rows import cut
from roundtable.common.model.tensor_bytes import to_frame
from roundtable.common.protocol.messages.embedding import InitialRows
from roundtable.common.protocol.messages.setup import InitialWeights, Setup
from roundtable.common.protocol.transport import Frames, bytes_of
from roundtable.common.runtime.errors import UsageError, WireError
from roundtable.common.storage.tensor_file import Entry
from roundtable.ps.model_parts import Part, parts_on
from roundtable.ps.params.dense import DenseParameters
from roundtable.ps.params.embedding import RowTables
from roundtable.ps.params.memory_budget import check_memory
from roundtable.ps.params.weight_buffers import WeightBuffers
from roundtable.ps.replication.shard_state import ShardState
from roundtable.ps.shard.checkpoint_writer import Source
from roundtable.ps.shard.context import Progress, ShardContext
from roundtable.ps.shard.kinds import METRICS, LayersKind, ParameterKind, RowsKind
from roundtable.ps.sharded.layers import LayerShards
from roundtable.ps.validation import check_distinct, check_setup

log = logging.getLogger("roundtable.ps.shard")


class FrozenChunks:
    """Frozen chunks: their weights lie in a buffer of their own until a worker contributes to them."""

    def __init__(self, dense: DenseParameters, buffers: WeightBuffers, chunks: set[int]) -> None:
        self._dense, self._buffers, self._chunks = dense, buffers, chunks
        #: By chunk that something was contributed to, the first version that this shows in.
        self._changed_in: dict[int, int] = {}

    def __contains__(self, chunk: object) -> bool:
        return chunk in self._chunks

    def unchanged(self, chunk: int, version: int) -> bool:
        """Return True if the weights of `version` of a frozen chunk are the first ones."""
        return chunk in self._chunks and version < self._changed_in.get(chunk, version + 1)

    def note_changes(self, version: int) -> None:
        """Note the chunks whose weights of `version` are the first that are not their first ones."""
        for chunk in self._chunks - self._changed_in.keys():
            if not self._dense.is_still(chunk):
                self._changed_in[chunk] = version

    def place(self) -> None:
        """Have the first weights where they stay."""
        for chunk in self._chunks:
            if self._dense.is_still(chunk):
                self._dense.place(chunk, self._buffers[self._buffers.home][chunk])

    def changed(self, version: int) -> list[int]:
        """Return the chunks whose weights of `version` are not their first ones."""
        return [chunk for chunk, since in self._changed_in.items() if since <= version]


class ShardModel:
    """What a server has of a model that workers have agreed on, with `buffers` versions of its weights."""

    def __init__(self, context: ShardContext, setup: Setup, sender: str, buffers: int) -> None:
        """Raises WireError if there can be no such model here."""
        check_setup(setup)
        index, settings, keeps = context.index, context.settings, context.policy.applies == "round"
        try:
            self.layout = layout = make_layout(setup.tensors, settings.servers, setup.tables, setup.sharded_layers)
            check_memory(layout, index, setup.update, context.device, settings.replicas)
            self.dense = DenseParameters(layout, index, setup.update, context.policy)
            self.tables = RowTables(layout, index, setup.update, settings.seed, keeps)
            self.layers = LayerShards(layout, index, setup.update, settings.seed, keeps, context.device)
        except WireError:
            raise
        except Exception as error:  # whatever torch objects to in what it is to make
            text = str(error).strip().splitlines()
            raise WireError(f"the model or its optimizer cannot be made: {text[0] if text else type(error).__name__}") from None
        self.setup = setup
        #: The worker that defined the model.
        self.sender = sender
        self.chunks = {chunk.id: chunk for chunk in layout.on(index)}
        rows, layers = RowsKind(self.tables, layout), LayersKind(self.layers)
        #: What is contributed to beside chunks.
        self.kinds: list[ParameterKind] = [kind for kind in (rows, layers) if kind]
        #: All that a contribution consists of here.
        self.ids = [*([METRICS] if index == 0 else []), *(kind.number for kind in self.kinds), *self.chunks]
        #: The parts of the model's file that are here.
        self.parts = parts_on(layout, index)
        self.buffers = WeightBuffers(layout.on(index), buffers, shared=settings.transport == "auto")
        if self.buffers.refused:
            log.warning("%s Workers get their weights through sockets.", self.buffers.refused)
        self.frozen = FrozenChunks(self.dense, self.buffers, {chunk.id for chunk in self.chunks.values() if chunk.frozen})
        #: Pages of tables whose first weights workers send; and these and chunks, as long as theirs are still to come.
        self._pages = self._awaited_pages()
        self._awaited: set[int | tuple[int, int]] = {*self.chunks, *self._pages}
        #: Whether all of it is still to come from the backup.
        self.is_returning = False

    @property
    def lacks_weights(self) -> bool:
        """Return True if first weights are still to come from workers."""
        return bool(self._awaited)

    @property
    def is_open(self) -> bool:
        """Return True if all numbers are here."""
        return not self._awaited and not self.is_returning

    # ---- first weights

    def initial_weights(self, sender: str, init: InitialWeights, frames: Frames) -> bool:
        """Take first weights. Returns True if these were the last ones. Raises WireError if they do not fit."""
        if len(frames) != len(init.chunks):
            raise WireError(f"first weights from {sender} do not fit the model agreed on")
        check_distinct(init.chunks, self.chunks, f"a message of {sender} with first weights")
        for chunk, frame in zip(init.chunks, frames, strict=True):
            if bytes_of(frame).nbytes != self.chunks[chunk].weight_bytes:
                raise WireError(f"first weights from {sender} do not fit chunk {chunk}")
        lacked = self.lacks_weights
        for chunk, frame in zip(init.chunks, frames, strict=True):
            if chunk in self._awaited:
                self.dense.load(chunk, frame)
                self._awaited.discard(chunk)
        return lacked and not self._awaited

    def initial_rows(self, sender: str, init: InitialRows, frames: Frames) -> bool:
        """Take first rows. Returns True if these were the last first weights. Raises WireError if they do not fit."""
        page = init.table, init.page
        if page not in self._pages:
            raise WireError(f"first rows from {sender} do not fit the model agreed on")
        if page not in self._awaited:
            return False
        tables = len(self.layout.tables)
        if init.table < tables:
            self.tables.load(init.table, init.page, frames)
        else:
            self.layers.load(init.table - tables, init.page, frames)
        self._awaited.discard(page)
        return not self._awaited

    def _awaited_pages(self) -> set[tuple[int, int]]:
        """Return (table, page) of first values that a worker is to send. Sharded layers count on from the tables."""
        after = len(self.layout.tables)
        return self.tables.awaited() | {(after + number, page) for number, page in self.layers.awaited()}

    def restore(self, source: Source, progress: Progress) -> None:
        """Have the state of a checkpoint, on however many servers it was taken."""
        source.files.on_read = progress.step
        try:
            self.dense.restore(source.files)
            self.tables.restore(source.files, source.servers, source.round)
            self.layers.restore(source.files, source.servers, source.round)
        except KeyError as error:
            raise UsageError(
                f"the checkpoint of round {source.round} lacks {error}: it is of another version or layout."
            ) from None
        self._awaited.clear()

    def has_returned(self) -> None:
        """All of it has come from the backup."""
        self._awaited.clear()
        self.is_returning = False

    # ---- what is saved

    @property
    def state(self) -> ShardState:
        """All numbers, for the backup."""
        return ShardState(self.dense, self.tables, self.layers)

    def entries(self, seen: Mapping[int, torch.Tensor], copies: bool) -> Iterator[Entry]:
        """Return a checkpoint's tensors, without those of sharded layers; see DenseParameters.state."""
        yield from self.dense.state(seen, copies)
        yield from self.tables.state()

    def frames_of(self, part: Part) -> list[memoryview]:
        """Return the frames of a part of the model's file, in the order of ps/model_parts.py."""
        if part.kind == "chunk":
            return [to_frame(self.dense.master(part.number))]
        if part.kind == "table":
            return cut(self.tables.page(part.number, part.page))
        return [frame for tensor in self.layers.page(part.number, part.page) for frame in cut(tensor)]
