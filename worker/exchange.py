"""A worker's dealings with the servers: pushes until they are acknowledged, and the pull of the next weights.

A state machine without a socket, a thread or a clock. Invariants: a push is forgotten only when every part of it is
acknowledged; staged weights all belong to the round last pulled; nothing received touches the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common.errors import WireError
from common.layout import Chunk, Layout, message_batches
from common.messages import Ack, Body, Gone, Pull, Push, Weights
from common.wire import SEND_AGAIN_S, Frames


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


class Exchange:
    """One worker's pushes and pulls, for all servers that take part in rounds."""

    def __init__(self, layout: Layout) -> None:
        self._chunks: dict[int, list[Chunk]] = {server: layout.on(server) for server in layout.owners()}
        self._outstanding: list[_Outstanding] = []
        #: The round whose weights are wanted; None before the first pull and when they have been taken.
        self.clock: int | None = None
        self._settled = False
        #: Frames of weights by chunk, as they came, and the version of each server's.
        self._staged: dict[int, Any] = {}
        self._versions: dict[int, int] = {}
        #: Mean metrics of the round before, with which server 0 ends its answer.
        self._metrics: dict[str, float] | None = None
        #: Set when a server says that the round wanted is over: the newest round it knows.
        self.gone: int | None = None
        self._pulled_at = float("-inf")

    # ---- pushing

    def push(self, push: Push, parts: dict[int, tuple[Any, int]], bases: dict[int, int], now: float) -> list[Send]:
        """Send a contribution: `parts` maps each chunk to its frame and the mask of pieces present.

        `push` holds what all messages of it share; its metrics go to server 0 alone. `bases` are the versions, by server,
        of the weights it was computed from.
        """
        effects: list[Send] = []
        for server, chunks in self._chunks.items():
            metrics = push.metrics if server == 0 else None
            for ids in message_batches([c.id for c in chunks], lambda i: len(parts[i][0])) or [[]]:
                message = Push(
                    push.round, push.lo, push.hi, push.samples, push.micro_batches, ids, [parts[i][1] for i in ids],
                    bases.get(server, 0), metrics, push.hypers,
                )  # fmt: skip
                metrics = None
                frames = [parts[i][0] for i in ids]
                self._outstanding.append(_Outstanding(f"server-{server}", message, frames, now))
                effects.append(Send(f"server-{server}", message, frames))
        return effects

    @property
    def unacknowledged(self) -> int:
        return len(self._outstanding)

    # ---- pulling

    def pull(self, clock: int, settled: bool, now: float) -> list[Send]:
        """Ask for the weights to start round `clock` from; what was staged for another round is let go."""
        self.clock, self._settled, self.gone = clock, settled, None
        self._staged, self._versions, self._metrics = {}, {}, None
        return self._ask(now)

    def _ask(self, now: float) -> list[Send]:
        assert self.clock is not None
        self._pulled_at = now
        return [
            Send(f"server-{server}", Pull(self.clock, [c.id for c in chunks if c.id in self._staged], self._settled))
            for server, chunks in self._chunks.items()
            if not self._done(server)
        ]

    def _done(self, server: int) -> bool:
        return all(c.id in self._staged for c in self._chunks[server]) and (server != 0 or self._metrics is not None)

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
        return staged, versions, metrics

    # ---- events

    def handle(self, server: str, body: Body, frames: Frames) -> None:
        """One message of a server. Raises WireError where it does not fit."""
        match body:
            case Ack():
                self._outstanding = [o for o in self._outstanding if not _acknowledges(server, body, o)]
            case Weights() if body.clock == self.clock:
                if len(frames) != len(body.chunks):
                    raise WireError(f"{server} sent {len(frames)} frames for {len(body.chunks)} chunks")
                for chunk, frame in zip(body.chunks, frames, strict=True):
                    self._staged.setdefault(chunk, frame)
                self._versions.setdefault(int(server.rpartition("-")[2]), body.version)
                if body.metrics is not None:
                    self._metrics = body.metrics
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
