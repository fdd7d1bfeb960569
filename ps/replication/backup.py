"""The backup's copy of a shard. With `--replicas 1` every shard has one, so that the loss of one server loses nothing.

This is primary and backup of Alsberg and Day ("A principle for resilient sharing of distributed resources", ICSE 1976). The
backup of server m's shard is the server after m. Server m forwards every update: the mean contribution of each round, the sums of
embedding rows, and the contributions to sharded layers. The backup applies the same with the same optimizer, so the copy has the
same bits.

A round is closed, and workers go on to the next, only when the backup has all of it. So a replacement server finds at the backup
every round that a worker has gone on from. Workers send their contributions to the open round again. They compute a contribution
again if no process has it any more.

Sharded layers are updated late, when a worker asks about the next round (`ps/sharded/layers.py`). Until then a worker may still
ask about the last round. So the backup delays the update as well, until the next round is complete: that proves that all workers
have reached the next round.

`Backup` is a state machine without a socket or a clock. Invariants: the copy is the state between two rounds, and no round is
skipped; the backup acknowledges only rounds that it has in full.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from roundtable.common.model.layout import Layout
from roundtable.common.model.partial_sum import Sum
from roundtable.common.model.sparse_rows import RowSums
from roundtable.common.policies import Policy
from roundtable.common.protocol.messages.replication import (
    Replicate,
    ReplicateLayers,
    ReplicateRows,
    RoundReplicated,
    RoundReplicatedAck,
    StateHeader,
    StatePart,
    StatePartAck,
)
from roundtable.common.protocol.transport import Frames
from roundtable.common.runtime.errors import WireError
from roundtable.ps.params.dense import DenseParameters
from roundtable.ps.params.embedding import RowTables
from roundtable.ps.params.state_part import Part
from roundtable.ps.params.weight_buffers import WeightBuffers
from roundtable.ps.replication.primary import remembered
from roundtable.ps.replication.shard_state import ShardState
from roundtable.ps.replication.state_transfer import Incoming
from roundtable.ps.sharded.contributions import LayerContribution
from roundtable.ps.sharded.layers import LayerShards

#: The backup refuses rounds that are more than this many ahead of its copy.
_AHEAD = 4


@dataclass
class _Round:
    """The contributions of one round that the primary has forwarded and the backup has not applied."""

    #: By chunk: the message and the mean contribution.
    means: dict[int, tuple[Replicate, Sum]] = field(default_factory=dict)
    #: The contribution to embedding rows.
    rows: tuple[ReplicateRows, RowSums] | None = None
    #: The contribution to sharded layers.
    classes: tuple[ReplicateLayers, list[LayerContribution]] | None = None
    #: The round's entry for the ledger, once all of the round is here.
    replicated: RoundReplicated | None = None


class Backup:
    """The copy of server `server`'s shard. It starts from the state that `head` announces."""

    def __init__(self, server: int, layout: Layout, policy: Policy, head: StateHeader, seed: int) -> None:
        """Make an empty copy. `seed` is the run's seed."""
        self.server = server
        self.head = head
        self.version = head.round
        self._chunks = {chunk.id: chunk for chunk in layout.on(server)}
        self._store = DenseParameters(layout, server, head.setup.update, policy)
        self._tables = RowTables(layout, server, head.setup.update, seed, keeps_versions=True)
        self._layers = LayerShards(layout, server, head.setup.update, seed)
        self._all = ShardState(self._store, self._tables, self._layers)
        self._weight_buffers = WeightBuffers(layout.on(server), 2, shared=False)
        self._incoming: Incoming | None = Incoming(head, self._all.put)
        self._rounds: dict[int, _Round] = {}
        #: Entries of closed rounds that the coordinator may not have.
        self._replicated = list(head.replicated_rounds)
        if self._incoming.complete:
            self._place()

    @property
    def whole(self) -> bool:
        """Return True if the initial state has arrived in full, so that a replacement server can get the shard here."""
        return self._incoming is None

    def put(self, part: StatePart, frames: Frames) -> StatePartAck | None:
        """Store a part of the initial state and return the acknowledgement. Raises WireError if the part does not fit.

        Return None for a part of another state.
        """
        if part.round != self.head.round:
            return None
        if self._incoming is not None:
            self._incoming.put(part, frames)
            if self._incoming.complete:
                self._place()
        return StatePartAck(part.shard, part.round, part.number)

    def _place(self) -> None:
        assert self._incoming is not None
        try:
            self._all.arrived(self._incoming)
            for chunk, into in self._weight_buffers[self.version % 2].items():
                still = self._store.is_still(chunk)
                self._store.place(chunk, self._weight_buffers[self._weight_buffers.home][chunk] if still else into)
                self._store.restore_seen(chunk, self._incoming, into)
        except (KeyError, RuntimeError) as error:
            raise WireError(f"the state of server-{self.server} does not fit its shard: {error}") from None
        self._incoming = None

    def forward(self, body: Replicate, frames: Frames) -> None:
        """Keep a chunk's mean contribution. Raises WireError if it does not fit."""
        if self._has_all(body.round):
            return
        if body.chunk not in self._chunks or len(frames) != bool(body.present):
            raise WireError(f"server-{self.server} forwarded chunk {body.chunk} with {len(frames)} frames")
        values = self._store.receive(body.chunk, frames[0], body.present) if body.present else Sum(torch.empty(0), 0)
        self._round(body.round).means.setdefault(body.chunk, (body, values))

    def forward_rows(self, body: ReplicateRows, frames: Frames) -> None:
        """Keep a contribution to embedding rows. Raises WireError if it does not fit."""
        if self._has_all(body.round):
            return
        rows = self._tables.receive(body, frames, f"what server-{self.server} forwarded")
        self._round(body.round).rows = body, rows

    def forward_classes(self, body: ReplicateLayers, frames: Frames) -> None:
        """Keep a contribution to sharded layers. Raises WireError if it does not fit."""
        if self._has_all(body.round):
            return
        parts = self._layers.received(body, frames, f"what server-{self.server} forwarded")
        self._round(body.round).classes = body, parts

    def _has_all(self, round_: int) -> bool:
        return round_ < self.version or (round_ in self._rounds and self._rounds[round_].replicated is not None)

    def file(self, body: RoundReplicated) -> RoundReplicatedAck | None:
        """Take the end of a round. Return the acknowledgement if all of the round is here, else None."""
        if body.round >= self.version:
            round_ = self._round(body.round)
            if round_.replicated is None:
                lacks_rows = bool(self._tables) and round_.rows is None
                lacks_classes = bool(self._layers) and round_.classes is None
                if len(round_.means) < len(self._chunks) or lacks_rows or lacks_classes:
                    return None
                round_.replicated = body
                self._replicated = remembered(self._replicated, body)
        return RoundReplicatedAck(body.round)

    def _round(self, number: int) -> _Round:
        if number > self.version + _AHEAD:
            raise WireError(f"server-{self.server} is in round {number} and its copy in round {self.version}")
        return self._rounds.setdefault(number, _Round())

    @property
    def busy(self) -> bool:
        """Return True if `work` has something to apply."""
        if not self.whole:
            return False
        return self._layers.busy or (self.version in self._rounds and self._rounds[self.version].replicated is not None)

    def work(self) -> None:
        """Apply one contribution of a complete round, or do one tile of a sharded layer."""
        if not self.busy:
            return
        if self._layers.busy:
            self._layers.work()
            return
        round_, into = self._rounds[self.version], self._weight_buffers[(self.version + 1) % 2]
        if round_.means:
            chunk = next(iter(round_.means))
            body, mean = round_.means.pop(chunk)
            before = self._weight_buffers[self._weight_buffers.home if self._store.is_still(chunk) else self.version % 2][chunk]
            self._store.apply(chunk, [mean], 1, body.hypers, self._factor(body.factor), into=into[chunk], before=before)
        elif round_.rows is not None:
            told, rows = round_.rows
            self._tables.apply(rows, told.weight, told.hypers, factor=self._factor(told.factor))
            round_.rows = None
        elif round_.classes is not None:
            what, parts = round_.classes
            self._layers.close(parts, what.weight, what.hypers, self._factor(what.factor))
            round_.classes = None
        if not round_.means and round_.rows is None and round_.classes is None:
            del self._rounds[self.version]
            self.version += 1

    def _factor(self, factor: float | None) -> torch.Tensor | None:
        return self._store.clipping.of_value(factor)

    @property
    def steps(self) -> int:
        """Return a number that grows while sharded layers are updated."""
        return self._layers.steps

    def hand_over(self) -> tuple[int, list[RoundReplicated], ReplicateLayers | None, list[Part]]:
        """Return the copy's state, for a replacement server. Call this only while `busy` is False.

        The state is: the version, the entries that the ledger may lack, the pending round of sharded layers, and the tensors.
        Contributions to later rounds are dropped: workers send them to the replacement, which forwards them again.
        """
        assert not self.busy
        self._rounds.clear()
        return self.version, self._replicated, self._layers.pending, self._all.parts(self._weight_buffers[self.version % 2])
