"""A server's part of the model: weights, optimizer state, weight buffers, and which first weights have not arrived."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch

from roundtable.common.model.layout import make_layout, together
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
from roundtable.ps.params.optimizer_classes import import_classes
from roundtable.ps.params.weight_buffers import WeightBuffers
from roundtable.ps.replication.shard_state import ShardState
from roundtable.ps.shard.checkpoint_writer import Source
from roundtable.ps.shard.context import Progress, ShardContext
from roundtable.ps.shard.kinds import METRICS, LayersKind, ParameterKind, RowsKind
from roundtable.ps.sharded.layers import LayerShards
from roundtable.ps.validation import check_distinct, check_setup

log = logging.getLogger("roundtable.ps.shard")


class FrozenChunks:
    """The frozen chunks. Their weights lie in the `home` weight buffer until a worker contributes to them."""

    def __init__(self, dense: DenseParameters, buffers: WeightBuffers, chunks: set[int]) -> None:
        self._dense, self._buffers, self._chunks = dense, buffers, chunks
        #: By frozen chunk that a worker contributed to: the first version with changed weights.
        self._changed_in: dict[int, int] = {}

    def __contains__(self, chunk: object) -> bool:
        return chunk in self._chunks

    def unchanged(self, chunk: int, version: int) -> bool:
        """Return True if the chunk is frozen and its weights of `version` are its first weights."""
        return chunk in self._chunks and version < self._changed_in.get(chunk, version + 1)

    def note_changes(self, version: int) -> None:
        """Record `version` as the first changed version of each frozen chunk that has just become trained."""
        for chunk in self._chunks - self._changed_in.keys():
            if not self._dense.is_still(chunk):
                self._changed_in[chunk] = version

    def place(self) -> None:
        """Write the first weights of frozen chunks to the `home` buffer."""
        for chunk in self._chunks:
            if self._dense.is_still(chunk):
                self._dense.place(chunk, self._buffers[self._buffers.home][chunk])

    def changed(self, version: int) -> list[int]:
        """Return the frozen chunks whose weights of `version` differ from their first weights."""
        return [chunk for chunk, since in self._changed_in.items() if since <= version]


class ShardModel:
    """A server's part of the model that workers have agreed on, with `buffers` weight buffers."""

    def __init__(self, context: ShardContext, setup: Setup, sender: str, buffers: int) -> None:
        """Make the model. Raises WireError if this server cannot hold the model or make its optimizer."""
        check_setup(setup)
        index, settings, keeps = context.index, context.settings, context.policy.applies == "round"
        try:
            self.layout = layout = make_layout(setup.tensors, settings.servers, setup.tables, setup.sharded_layers)
            import_classes(setup.update, context.trusts)
            check_memory(layout, index, setup.update, context.device, settings.replicas)
            self.dense = DenseParameters(layout, index, setup.update, context.policy)
            self.tables = RowTables(layout, index, setup.update, settings.seed, keeps)
            self.layers = LayerShards(layout, index, setup.update, settings.seed, keeps, context.device)
        except WireError:
            raise
        except Exception as error:  # any error of torch about the model or its optimizer
            text = str(error).strip().splitlines()
            raise WireError(f"the model or its optimizer cannot be made: {text[0] if text else type(error).__name__}") from None
        self.setup = setup
        #: The worker that defined the model.
        self.sender = sender
        self.chunks = {chunk.id: chunk for chunk in layout.on(index)}
        #: By chunk: the other chunks that are updated with it, of a tensor that is updated whole.
        self.others = {c.id: [o.id for o in some if o is not c] for some in together(self.chunks.values()) for c in some}
        rows, layers = RowsKind(self.tables, layout), LayersKind(self.layers)
        #: The parameters, beside chunks, that workers contribute to.
        self.kinds: list[ParameterKind] = [kind for kind in (rows, layers) if kind]
        #: Numbers of all parts that a contribution has on this server (see `ps/shard/kinds.py`).
        self.ids = [*([METRICS] if index == 0 else []), *(kind.number for kind in self.kinds), *self.chunks]
        #: The parts of the model's file that this server sends.
        self.parts = parts_on(layout, index)
        self.buffers = WeightBuffers(layout.on(index), buffers, shared=settings.transport == "auto")
        if self.buffers.refused:
            log.warning("%s Workers get their weights over TCP.", self.buffers.refused)
        self.frozen = FrozenChunks(self.dense, self.buffers, {chunk.id for chunk in self.chunks.values() if chunk.frozen})
        #: (table, page) whose first rows workers send.
        self._pages = self._awaited_pages()
        #: Chunks and pages whose first weights have not arrived.
        self._awaited: set[int | tuple[int, int]] = {*self.chunks, *self._pages}
        #: True while the shard's state is on its way back from the backup.
        self.is_returning = False

    @property
    def lacks_weights(self) -> bool:
        """Return True if workers still have to send first weights."""
        return bool(self._awaited)

    @property
    def is_open(self) -> bool:
        """Return True if all weights and optimizer state have arrived."""
        return not self._awaited and not self.is_returning

    # ---- first weights

    def initial_weights(self, sender: str, init: InitialWeights, frames: Frames) -> bool:
        """Take first weights. Return True if no more are awaited. Raises WireError if they do not fit."""
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
        """Take first rows. Return True if no more first weights are awaited. Raises WireError if they do not fit."""
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
        """Return (table, page) of the first rows that a worker has to send. Sharded layers are numbered after the tables."""
        after = len(self.layout.tables)
        return self.tables.awaited() | {(after + number, page) for number, page in self.layers.awaited()}

    def restore(self, source: Source, progress: Progress) -> None:
        """Load the state of a checkpoint, whatever its number of servers. Raises UsageError if a tensor is missing."""
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
        """Record that the shard's whole state has arrived from the backup."""
        self._awaited.clear()
        self.is_returning = False

    # ---- saving

    @property
    def state(self) -> ShardState:
        """Return the shard's state, for the backup."""
        return ShardState(self.dense, self.tables, self.layers)

    def entries(self, seen: Mapping[int, torch.Tensor], copies: bool) -> Iterator[Entry]:
        """Return a checkpoint's tensors without those of sharded layers. See `DenseParameters.state` for the arguments."""
        yield from self.dense.state(seen, copies)
        yield from self.tables.state()

    def frames_of(self, part: Part) -> list[memoryview]:
        """Return the frames of a part of the model's file, in the order that `ps/model_parts.py` defines."""
        if part.kind == "chunk":
            return [to_frame(self.dense.master(part.number))]
        if part.kind == "table":
            return cut(self.tables.page(part.number, part.page))
        return [frame for tensor in self.layers.page(part.number, part.page) for frame in cut(tensor)]
