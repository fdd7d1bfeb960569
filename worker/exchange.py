"""A worker's dealings with the servers: pushes until they are acknowledged, and the pull of the next weights.

A state machine without a socket, a thread or a clock. Invariants: a push is forgotten only when every part of it is
acknowledged; staged weights all belong to the round last pulled; nothing received touches the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from common.errors import WireError
from common.layout import Chunk, Layout, message_batches
from common.messages import Ack, Body, Gone, Pull, Push, Weights
from common.sums import Sum
from common.tensors import to_frame
from common.wire import SEND_AGAIN_S, Frames
from worker.mapped import InPlane
from worker.slots import Slot


@dataclass(frozen=True)
class Send:
    """Effect: send `body` and `frames` to the process called `to`."""

    to: str
    body: Body
    frames: Frames = ()


@dataclass
class _Outstanding:
    server: str
    push: Push
    frames: Frames
    sent_at: float
    slot: Slot | None


class Exchange:
    """One worker's pushes and pulls, for all servers that take part in rounds."""

    def __init__(self, layout: Layout) -> None:
        self._chunks: dict[int, list[Chunk]] = {server: layout.on(server) for server in layout.owners()}
        self._outstanding: list[_Outstanding] = []
        #: The round whose weights are wanted; None before the first pull and when they have been taken.
        self.clock: int | None = None
        self._settled = False
        self._pulls = 0
        #: Weights by chunk, as frames or where they are, and the version of each server's.
        self._staged: dict[int, Any] = {}
        self._versions: dict[int, int] = {}
        #: Mean metrics of the round before, with which server 0 ends its answer.
        self._metrics: dict[str, float] | None = None
        #: Servers without whose last word the worker must not go on, and those that have given it.
        self._enders = set(layout.owners()) if layout.tables else {0}
        self._ended: set[int] = set()
        #: Set when a server says that the round wanted is over: the newest round it knows.
        self.gone: int | None = None
        self._pulled_at = float("-inf")
        #: Servers that read this worker's slots, and those whose planes it reads; and the planes that the model is in.
        self.readers: set[int] = set()
        self.read: set[int] = set()
        self._planes: dict[int, int] = {}

    # ---- pushing

    def push(
        self,
        push: Push,
        sums: Mapping[int, Sum],
        now: float,
        bases: Mapping[int, int] | None = None,
        slot: Slot | None = None,
    ) -> list[Send]:
        """Send a contribution, `sums` by chunk; to servers that can read `slot`, in which they lie, only word of it.

        `push` holds what all messages of it share; its metrics go to server 0 alone. `bases` are the versions, by server,
        of the weights it was computed from.
        """
        effects: list[Send] = []
        for server, chunks in self._chunks.items():
            reads = slot is not None and slot.index >= 0 and server in self.readers
            ids = [chunk.id for chunk in chunks]
            metrics = push.metrics if server == 0 else None
            for batch in [ids] if reads else message_batches(ids, lambda i: sums[i].values.nbytes) or [[]]:
                message = msgspec.structs.replace(
                    push, chunks=batch, present=[sums[i].present for i in batch], base=(bases or {}).get(server, 0),
                    metrics=metrics, slot=slot.index if reads and slot is not None else -1,
                    scale=max((sums[i].scale for i in batch), default=1.0),
                )  # fmt: skip
                metrics = None
                frames = [] if reads else [to_frame(sums[i].values) for i in batch]
                self._outstanding.append(_Outstanding(f"server-{server}", message, frames, now, slot))
                effects.append(Send(f"server-{server}", message, frames))
        return effects

    def needs(self, slot: Slot) -> bool:
        """Whether a push of what is in `slot` is not acknowledged yet."""
        return any(outstanding.slot is slot for outstanding in self._outstanding)

    def unacknowledged(self, round_: int) -> list[int]:
        """Micro-batches of `round_` that were pushed and may not have arrived everywhere."""
        pushes = (outstanding.push for outstanding in self._outstanding)
        return sorted({k for push in pushes if push.round == round_ for k in range(push.lo, push.hi)})

    # ---- pulling

    def pull(self, clock: int, settled: bool, now: float) -> list[Send]:
        """Ask for the weights to start round `clock` from; what was staged for another round is let go."""
        self.clock, self._settled, self.gone = clock, settled, None
        self._pulls += 1
        self._staged, self._versions, self._metrics, self._ended = {}, {}, None, set()
        return self._ask(now)

    def _ask(self, now: float) -> list[Send]:
        assert self.clock is not None
        self._pulled_at = now
        return [
            Send(f"server-{server}", self._pull(server, [c.id for c in chunks if c.id in self._staged]))
            for server, chunks in self._chunks.items()
            if not self._done(server)
        ]

    def _pull(self, server: int, have: list[int]) -> Pull:
        assert self.clock is not None
        return Pull(self.clock, self._pulls, have, self._settled, server in self.read, self._planes.get(server, -1))

    def _done(self, server: int) -> bool:
        return all(c.id in self._staged for c in self._chunks[server]) and server not in self._enders - self._ended

    @property
    def complete(self) -> bool:
        """Whether all weights asked for are here."""
        return self.clock is not None and all(self._done(server) for server in self._chunks)

    def missing(self) -> list[tuple[str, list[int]]]:
        """Servers whose answer is not complete, and the chunks still to come."""
        return [
            (f"server-{server}", [c.id for c in chunks if c.id not in self._staged])
            for server, chunks in self._chunks.items()
            if not self._done(server)
        ]

    def take(self) -> tuple[dict[int, Any], dict[int, int], dict[str, float]]:
        """The staged weights by chunk, their versions by server, and the metrics of the round before. Ends the pull."""
        assert self.complete and self._metrics is not None
        staged, versions, metrics = self._staged, self._versions, self._metrics
        self.clock, self._staged = None, {}
        for found in staged.values():
            if isinstance(found, InPlane):
                self._planes[found.server] = found.plane
        return staged, versions, metrics

    # ---- events

    def handle(self, server: str, body: Body, frames: Frames) -> None:
        """One message of a server. Raises WireError where it does not fit."""
        match body:
            case Ack():
                self._outstanding = [o for o in self._outstanding if not _acknowledges(server, body, o)]
            case Weights() if body.clock == self.clock:
                number = int(server.rpartition("-")[2])
                found = frames if body.plane < 0 else [InPlane(number, body.plane)] * len(body.chunks)
                if len(found) != len(body.chunks):
                    raise WireError(f"{server} sent {len(frames)} frames for {len(body.chunks)} chunks")
                for chunk, place in zip(body.chunks, found, strict=True):
                    self._staged.setdefault(chunk, place)
                self._versions.setdefault(number, body.version)
                if body.metrics is not None:
                    self._ended.add(number)
                    self._metrics = body.metrics if number == 0 else self._metrics
            case Gone() if body.clock == self.clock:
                self.gone = max(body.newest, self.gone or 0)
            case Weights() | Gone():
                pass
            case _:
                raise WireError(f"a worker has no use for {type(body).__name__}")

    def tick(self, now: float) -> list[Send]:
        """What was not answered for too long is sent again."""
        effects = []
        for outstanding in self._outstanding:
            if now >= outstanding.sent_at + SEND_AGAIN_S:
                outstanding.sent_at = now
                effects.append(Send(outstanding.server, outstanding.push, outstanding.frames))
        if self.clock is not None and not self.complete and now >= self._pulled_at + SEND_AGAIN_S:
            effects += self._ask(now)
        return effects


def _acknowledges(server: str, ack: Ack, outstanding: _Outstanding) -> bool:
    push = outstanding.push
    return (
        outstanding.server == server
        and (ack.round, ack.lo, ack.hi, ack.chunks) == (push.round, push.lo, push.hi, push.chunks)
        and ack.metrics == (push.metrics is not None)
    )
