"""A worker's pulls and pushes of embedding rows.

A state machine without a socket, a thread or a clock. The worker waits for one pull at a time. Invariants:

- A push is forgotten only when it is acknowledged.
- The rows taken are all the rows of the newest pull.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec
import torch

from roundtable.common.model.sparse_rows import RowSums, cut, cut_sums, join, owner_of, split
from roundtable.common.protocol.effects import Send
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.embedding import RowAck, RowPull, RowPush, Rows
from roundtable.common.protocol.messages.session import Traffic
from roundtable.common.protocol.model_spec import TableSpec
from roundtable.common.protocol.transport import Frames, bytes_of
from roundtable.common.runtime.errors import WireError
from roundtable.worker.client.retransmit import RetransmitQueue, Sent, again, due


class EmbeddingClient:
    """One worker's pulls and pushes of rows."""

    def __init__(self, tables: Sequence[TableSpec], servers: int, may_be_replaced: bool = False) -> None:
        """`may_be_replaced`: a new process, which has closed as many rounds, may take a server's place."""
        self._tables = tables
        self._servers = servers
        self._pushes = RetransmitQueue(may_be_replaced)
        #: By number: questions without an answer.
        self._questions: dict[int, Sent[RowPull]] = {}
        #: By number: which of the wanted rows the question is about, as int64 positions.
        self._places: dict[int, torch.Tensor] = {}
        #: By number: answers.
        self._answers: dict[int, torch.Tensor] = {}
        self._number = 0
        #: Number of rows that were asked for, and their length.
        self._shape = 0, 0
        #: Bytes of tensors, repetitions included.
        self._pushed_bytes = self._pulled_bytes = 0

    # ---- pulling

    def pull(self, table: int, ids: torch.Tensor, version: int, now: float) -> list[Send]:
        """Ask for the rows with these sorted, distinct ids. Drop the previous pull."""
        return self._ask(table, ids, lambda number, part: (RowPull(number, table, version, len(part)), cut(part)), now)

    def _ask(
        self, table: int, ids: torch.Tensor, question: Callable[[int, torch.Tensor], tuple[RowPull, Frames]], now: float
    ) -> list[Send]:
        self._questions, self._places, self._answers = {}, {}, {}
        self._shape = len(ids), self._tables[table].dim
        owners = owner_of(ids, self._servers)
        for server in range(self._servers):
            places = (owners == server).nonzero().flatten()
            if len(places):
                self._number += 1
                self._places[self._number] = places
                self._questions[self._number] = Sent(f"server-{server}", *question(self._number, ids[places]), now)
        return [self._send(sent) for sent in self._questions.values()]

    def _send(self, sent: Sent[Body]) -> Send:
        self._pushed_bytes += sum(frame.nbytes for frame in sent.frames)
        return Send(sent.server, sent.body, sent.frames)

    @property
    def complete(self) -> bool:
        """Whether all rows asked for are here."""
        return not self._questions

    def missing(self) -> list[str]:
        """Return the servers that have not answered."""
        return [sent.server for sent in self._questions.values()]

    def take(self) -> torch.Tensor:
        """Return the rows that were asked for, (N, dim) float32, in the order of their ids."""
        assert self.complete
        rows = torch.empty(self._shape)
        for number, values in self._answers.items():
            rows.index_copy_(0, self._places[number], values)
        return rows

    # ---- pushing

    def push(self, push: RowPush, sums: RowSums, bases: Mapping[int, int], now: float) -> list[Send]:
        """Send every server its part of a contribution.

        `push` holds what all messages of the contribution share. `bases` are the versions, by server, of the weights that it was
        computed from.
        """
        effects = []
        for server, part in enumerate(split(sums, self._servers)):
            body = msgspec.structs.replace(push, counts=[one.count for one in part], base_version=bases.get(server, 0))
            sent = Sent(f"server-{server}", body, cut_sums(part), now)
            self._pushes.add(sent)
            effects.append(self._send(sent))
        return effects

    @property
    def idle(self) -> bool:
        """Whether servers have acknowledged all pushes."""
        return not self._pushes.sent

    def unacknowledged(self, round_: int) -> set[int]:
        """Return the micro-batches of `round_` that were pushed but not acknowledged by all servers."""
        return self._pushes.of_round(round_)

    # ---- events

    def handle(self, server: str, body: Rows | RowAck, frames: Frames) -> None:
        """Take one message of a server. Raises WireError if it does not fit."""
        if isinstance(body, RowAck):
            self._pushes.acknowledged(server, body)
        elif body.number in self._questions:
            count, dim = len(self._places[body.number]), self._shape[1]
            if body.count != count:
                raise WireError(f"{server} sent {body.count} rows, but was asked for {count}")
            self._pulled_bytes += sum(bytes_of(frame).nbytes for frame in frames)
            self._answers[body.number] = join(iter(frames), "float32", count * dim, f"an answer of {server}").view(count, dim)
            del self._questions[body.number]

    def replaced(self, server: int) -> None:
        """Send a server that is a new process all pushes of the open round again, and the questions without an answer."""
        self._pushes.replaced(f"server-{server}")
        again(self._questions.values(), f"server-{server}")

    @property
    def traffic(self) -> Traffic:
        """The traffic of rows so far."""
        return Traffic(self._pushed_bytes, self._pulled_bytes)

    def tick(self, now: float) -> list[Send]:
        """Send again the messages that were not answered in time."""
        late = due([*self._pushes.sent, *self._questions.values()], now)
        return [self._send(sent) for sent in late]
