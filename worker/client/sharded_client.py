"""A worker's questions about sharded layers, and its pushes to them.

A state machine without a socket, a thread or a clock. The worker waits for one question at a time. Invariants:

- A push is forgotten only when it is acknowledged.
- The answers taken are those of all servers to the newest question, or one server has refused it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch

from roundtable.common.model.sparse_rows import cut, join, owner_of, rows_on
from roundtable.common.protocol.effects import Send, number_of
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.session import Traffic
from roundtable.common.protocol.messages.sharded import LayerAck, LayerPush, ShardedForward, ShardedForwardReply
from roundtable.common.protocol.model_spec import ShardedLayerSpec
from roundtable.common.protocol.transport import SEND_AGAIN_S, Frames, bytes_of
from roundtable.common.runtime.errors import WireError
from roundtable.worker.client.retransmit import RetransmitQueue, Sent, again, due

#: Longest wait, in seconds, before an unanswered message is sent again.
_PATIENCE_S = 4 * SEND_AGAIN_S


@dataclass(frozen=True)
class Sums:
    """One server's answer, see `ShardedForwardReply`: the largest logit and the total of each sample (B), and rows (B, D).

    If asked for, also the sum of all rows (dim). Then the rows of the labels that the server has (N, dim).
    """

    largest: torch.Tensor
    total: torch.Tensor
    rows: torch.Tensor
    sum_of_rows: torch.Tensor
    own: torch.Tensor


@dataclass(frozen=True)
class Best:
    """The largest logits of each sample on one server (B, k), and their classes."""

    values: torch.Tensor
    classes: torch.Tensor


#: A server's answer. A tensor answers a question about a hidden layer. None: the server no longer has that version.
Answer = Sums | Best | torch.Tensor | None


class ShardedClient:
    """One worker's questions about sharded layers, and its pushes."""

    def __init__(self, specs: Sequence[ShardedLayerSpec], servers: int, first_number: int, may_be_replaced: bool = False) -> None:
        """Count questions from `first_number`, which no earlier process of the same name has used.

        `may_be_replaced`: a new process, which has closed as many rounds, may take a server's place.
        """
        self._specs = specs
        self._servers = servers
        self._number = first_number
        self._pushes = RetransmitQueue(may_be_replaced)
        self._may_be_replaced = may_be_replaced
        #: By number: questions of the newest round to which a push may refer, with the frames that repeat each one to a server.
        self._asked: dict[int, tuple[ShardedForward, Sequence[Frames]]] = {}
        #: By server that was replaced: the newest question that its new process may not know.
        self._unknown_to: dict[str, int] = {}
        self._question: ShardedForward | None = None
        #: By server: how many of the labels it has.
        self._own: list[int] = []
        #: By server: the question, if it is not answered.
        self._unanswered: dict[int, Sent[ShardedForward]] = {}
        #: By server: its answer.
        self._answers: dict[int, Answer] = {}
        #: Bytes of tensors, repetitions included.
        self._pushed_bytes = 0
        self._pulled_bytes = 0

    # ---- asking

    def ask(self, question: ShardedForward, tensors: Sequence[torch.Tensor], now: float) -> list[Send]:
        """Ask all servers. `tensors` are the features, and the labels if the question has any. Drop the previous question.

        The number of `question` is set here.
        """
        owners = owner_of(tensors[1], self._servers) if len(tensors) > 1 else torch.empty(0)
        self._own = [int((owners == server).sum()) for server in range(self._servers)]
        frames = [frame for tensor in tensors for frame in cut(tensor)]
        return self._ask(question, [frames] * self._servers, [frames] * self._servers, now)

    def ask_back(self, question: ShardedForward, slopes: torch.Tensor, features: torch.Tensor, now: float) -> list[Send]:
        """Ask all servers for the gradients of a hidden layer's inputs. Drop the previous question.

        `slopes` (B, rows) is the loss's gradient by the layer's outputs, which were computed from `features` (B, D).
        """
        owners = owner_of(torch.arange(slopes.shape[1]), self._servers)
        frames = [cut(slopes[:, owners == server]) for server in range(self._servers)]
        again_ = cut(features)
        return self._ask(question, frames, [[*own, *again_] for own in frames], now)

    def _ask(self, question: ShardedForward, frames: Sequence[Frames], whole: Sequence[Frames], now: float) -> list[Send]:
        """Ask each server with its `frames`. `whole` are the frames for a server that knows no earlier question."""
        self._number += 1
        self._question = msgspec.structs.replace(question, number=self._number)
        if self._may_be_replaced and question.keeps:
            self._asked = {n: kept for n, kept in self._asked.items() if kept[0].version >= question.version}
            told = msgspec.structs.replace(self._question, with_features=question.back_through >= 0)
            self._asked[self._number] = told, whole
        self._unanswered = {n: Sent(f"server-{n}", self._question, frames[n], now) for n in range(self._servers)}
        self._answers = {}
        return [self._send(sent) for sent in self._unanswered.values()]

    def _send(self, sent: Sent[Body]) -> Send:
        body, frames = sent.body, sent.frames
        number, newest = number_of(sent.server), self._unknown_to.get(sent.server, -1)
        if isinstance(body, LayerPush):
            asked = [self._asked[use.number] for use in body.uses if use.number <= newest and use.number in self._asked]
            body = msgspec.structs.replace(body, questions=[question for question, _ in asked])
            frames = [*(frame for _, of in asked for frame in of[number]), *frames]
        elif isinstance(body, ShardedForward) and 0 <= body.back_through <= newest:
            body, frames = self._asked[body.number][0], self._asked[body.number][1][number]
        self._pushed_bytes += sum(frame.nbytes for frame in frames)
        return Send(sent.server, body, frames)

    @property
    def number(self) -> int:
        """The number of the newest question."""
        return self._number

    @property
    def gone(self) -> bool:
        """Whether a server no longer has the version asked about."""
        return None in self._answers.values()

    @property
    def complete(self) -> bool:
        """Whether there is nothing to wait for."""
        return not self._unanswered or self.gone

    def missing(self) -> list[str]:
        """Return the servers that have not answered."""
        return [f"server-{server}" for server in self._unanswered]

    def take(self) -> list[Sums]:
        """Return the answers, by server."""
        assert self.complete and not self.gone
        return [answer for _, answer in sorted(self._answers.items()) if isinstance(answer, Sums)]

    def take_best(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the largest logits of each sample (B, k), in descending order, and their classes (B, k)."""
        assert self.complete and self._question is not None
        answers = [answer for _, answer in sorted(self._answers.items()) if isinstance(answer, Best)]
        best, order = torch.cat([answer.values for answer in answers], 1).topk(self._question.top, 1)
        return best, torch.cat([answer.classes for answer in answers], 1).gather(1, order)

    def take_outputs(self) -> torch.Tensor:
        """Return all outputs of a hidden layer (B, rows)."""
        assert self.complete and not self.gone and self._question is not None
        rows = self._specs[self._question.layer].rows
        owners, out = owner_of(torch.arange(rows), self._servers), torch.empty(self._question.count, rows)
        for server, answer in self._answers.items():
            if isinstance(answer, torch.Tensor):
                out[:, owners == server] = answer
        return out

    def take_slopes(self) -> torch.Tensor:
        """Return the loss's gradient by a hidden layer's features (B, D): the sum of the servers' parts, in order."""
        assert self.complete and not self.gone
        return torch.stack([answer for _, answer in sorted(self._answers.items()) if isinstance(answer, torch.Tensor)]).sum(0)

    def _decode(self, server: int, answer: ShardedForwardReply, frames: Frames) -> Answer:
        """Return the decoded answer. Raises WireError if it does not fit the question."""
        ask, parts, what = self._question, iter(frames), f"an answer of server-{server}"
        assert ask is not None
        spec = self._specs[ask.layer]

        def part(*shape: int, dtype: str = "float32") -> torch.Tensor:
            return join(parts, dtype, torch.Size(shape).numel(), what).view(shape)

        decoded: Answer
        if answer.gone:
            decoded = None
        elif ask.back_through >= 0:
            decoded = part(ask.count, spec.dim - spec.bias)
        elif spec.hidden:
            decoded = part(ask.count, rows_on(server, self._servers, spec.rows))
        elif ask.top:
            top = min(ask.top, rows_on(server, self._servers, spec.rows))
            decoded = Best(part(ask.count, top), part(ask.count, top, dtype="int64"))
        else:
            per_sample = part(ask.count), part(ask.count), part(ask.count, spec.dim - spec.bias)
            decoded = Sums(*per_sample, part(spec.dim * ask.sums), part(self._own[server], spec.dim))
        if next(parts, None) is not None:
            raise WireError(f"{what} has too many frames")
        return decoded

    # ---- pushing

    def push(self, push: LayerPush, tensors: Sequence[torch.Tensor], bases: Mapping[int, int], now: float) -> list[Send]:
        """Send every server a contribution. `bases` are the versions, by server, of the dense weights it was computed from."""
        frames = [frame for tensor in tensors for frame in cut(tensor)]
        bodies = [msgspec.structs.replace(push, base_version=bases.get(number, 0)) for number in range(self._servers)]
        sent = [Sent(f"server-{number}", body, frames, now) for number, body in enumerate(bodies)]
        for one in sent:
            self._pushes.add(one)
        return [self._send(one) for one in sent]

    @property
    def idle(self) -> bool:
        """Whether servers have acknowledged all pushes."""
        return not self._pushes.sent

    def unacknowledged(self, round_: int) -> set[int]:
        """Return the micro-batches of `round_` that were pushed but not acknowledged by all servers."""
        return self._pushes.of_round(round_)

    # ---- events

    def handle(self, server: str, body: ShardedForwardReply | LayerAck, frames: Frames) -> None:
        """Take one message of a server. Raises WireError if it does not fit."""
        number = number_of(server)
        if isinstance(body, LayerAck):
            self._pushes.acknowledged(server, body)
        elif body.number == self._number and number in self._unanswered:
            self._pulled_bytes += sum(bytes_of(frame).nbytes for frame in frames)
            self._answers[number] = self._decode(number, body, frames)
            del self._unanswered[number]

    def replaced(self, server: int) -> None:
        """Send a server that is a new process all pushes of the open round again, and the question if it is not answered."""
        name = f"server-{server}"
        self._unknown_to[name] = self._number
        self._pushes.replaced(name)
        again(self._unanswered.values(), name)

    @property
    def traffic(self) -> Traffic:
        """The traffic of questions, answers and pushes so far."""
        return Traffic(self._pushed_bytes, self._pulled_bytes)

    def tick(self, now: float) -> list[Send]:
        """Send again the messages that were not answered in time."""
        late = due([*self._pushes.sent, *self._unanswered.values()], now, _PATIENCE_S)
        return [self._send(sent) for sent in late]
