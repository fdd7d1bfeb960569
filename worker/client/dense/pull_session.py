"""The pull of the weights that a round starts from, from all servers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from roundtable.common.model.layout import Chunk, Layout
from roundtable.common.protocol.effects import Send
from roundtable.common.protocol.messages.gradients import Pull, UsedSettings, VersionExpired, Weights, WeightsCredit
from roundtable.common.protocol.transport import Frames, bytes_of
from roundtable.common.runtime.errors import WireError
from roundtable.common.runtime.failpoints import failpoint
from roundtable.worker.client.dense.compression import WeightDecoder
from roundtable.worker.client.dense.servers import LastHeard, SharedMemoryPeers
from roundtable.worker.replica.mapped_weights import InWeightBuffer


class PullSession:
    """Asks servers for the weights of one round, asks silent servers again, and keeps weights until they are taken."""

    def __init__(self, layout: Layout, decoder: WeightDecoder, peers: SharedMemoryPeers, heard: LastHeard) -> None:
        self._decoder, self._peers, self._heard = decoder, peers, heard
        self._chunks: dict[int, list[Chunk]] = {server: layout.on(server) for server in layout.owners()}
        #: The round whose weights are wanted; None before the first pull and when they have been taken.
        self.for_round: int | None = None
        #: Whether the weights must include all updates.
        self._after_all_updates = False
        #: Whether weights without the rounding of a codec are wanted.
        self._full_precision = False
        #: Number of pulls so far.
        self._pulls = 0
        #: By chunk: the weights, as frames or where they lie; None if they were taken already.
        self._staged: dict[int, Any] = {}
        #: By server: the version of its weights.
        self._versions: dict[int, int] = {}
        #: Servers that have closed the previous round.
        self._closed_on: set[int] = set()
        #: By server: the frozen chunks that have had contributions. Every round brings new weights of these.
        self._changed_frozen: dict[int, set[int]] = {}
        #: Whether the weights of the other frozen chunks, which never change, are here.
        self._has_still = False
        #: Whether the next pull asks for those again. All servers send theirs, because a tensor may lie on several servers.
        self._asks_for_still = False
        #: Credit for servers that is still to be sent.
        self._credits: list[Send] = []
        #: By server that has answered that the wanted round is over: the newest round that it knows.
        self._newest: dict[int, int] = {}
        #: By server: when it was last asked; -inf if it was not asked yet.
        self._asked_at: dict[int, float] = {}
        #: By server whose memory this worker reads: the weight buffer that the model uses.
        self._weight_buffers: dict[int, int] = {}
        #: Bytes received so far.
        self.bytes = 0
        #: The settings of the newest round that servers have told.
        self.settings: UsedSettings | None = None

    # ---- asking

    def begin(self, for_round: int, after_all_updates: bool, full_precision: bool, only_asks: bool = False) -> None:
        """Start a pull of the weights of round `for_round`, and drop weights that were kept for another round.

        `only_asks`: this worker has the weights, and servers only answer whether they still have them.
        """
        self.for_round, self._after_all_updates, self._full_precision, self._newest = (
            for_round,
            after_all_updates,
            full_precision,
            {},
        )
        self._pulls += 1
        self._decoder.begin()
        self._staged, self._versions, self._closed_on, self._changed_frozen = {}, {}, set(), {}
        self._has_still, self._asks_for_still = self._has_still and not self._asks_for_still, False
        self._asked_at = dict.fromkeys(self._chunks, float("-inf"))
        if only_asks:
            self._staged = dict.fromkeys(chunk.id for chunks in self._chunks.values() for chunk in chunks)

    def want_all(self) -> None:
        """Have the next pull bring all weights, also the frozen ones that have come before."""
        self._asks_for_still = True

    def ask(self, now: float, but_not: Collection[int]) -> list[Send]:
        """Ask each server, except `but_not`, that was not asked yet or is silent."""
        if self.for_round is None:
            return []
        servers = [
            server
            for server, asked_at in self._asked_at.items()
            if server not in but_not and not self._done(server) and self._heard.is_silent(server, asked_at, now)
        ]
        self._asked_at.update(dict.fromkeys(servers, now))
        return [Send(f"server-{server}", self._message(self.for_round, server)) for server in servers]

    def _message(self, for_round: int, server: int) -> Pull:
        have = [chunk.id for chunk in self._chunks[server] if chunk.id in self._staged]
        shared = server in self._peers.readable and not self._full_precision
        return Pull(
            for_round, self._pulls, have, self._after_all_updates, shared, self._weight_buffers.get(server, -1),
            self._decoder.holds(server), self._full_precision, not self._has_still,
        )  # fmt: skip

    def credits(self) -> list[Send]:
        """Return the credit for frames that have come since the last call."""
        credits, self._credits = self._credits, []
        return credits

    # ---- what has come

    def _lacks(self, server: int) -> list[int]:
        """Return the chunks that a server is still to send, as far as this worker knows."""
        changed = self._changed_frozen.get(server, ())
        return [c.id for c in self._chunks[server] if c.id not in self._staged and (self._comes(c) or c.id in changed)]

    def _comes(self, chunk: Chunk) -> bool:
        return not chunk.frozen or not self._has_still

    def _done(self, server: int) -> bool:
        return server in self._closed_on and not self._lacks(server)

    @property
    def complete(self) -> bool:
        """Whether all weights asked for are here."""
        return self.for_round is not None and all(self._done(server) for server in self._chunks)

    @property
    def receives(self) -> bool:
        """Whether some weights are sent here, rather than read from a server's memory."""
        return any(chunks and server not in self._peers.readable for server, chunks in self._chunks.items())

    def usable(self, needed: Collection[int]) -> bool:
        """Return whether the round can start: all servers have closed the previous one, and the `needed` chunks are here."""
        return self.for_round is not None and self._closed_on >= self._chunks.keys() and self.has(needed)

    def has(self, chunks: Collection[int]) -> bool:
        """Return whether none of these chunks is still to come."""
        return not self.to_come.intersection(chunks)

    @property
    def to_come(self) -> set[int]:
        """The chunks that the pull under way is still to bring."""
        if self.for_round is None:
            return set()
        return {chunk for server in self._chunks for chunk in self._lacks(server)}

    @property
    def gone(self) -> bool:
        """Whether a server has answered that the wanted round is over."""
        return bool(self._newest)

    @property
    def over(self) -> int | None:
        """The round to ask for instead, once every server has answered; None if the wanted round is not over.

        The round is the earliest of the newest rounds that servers know. If this worker went further, it could not compute what a
        slower server still lacks, and there may be no other worker.
        """
        answered = all(server in self._newest or self._done(server) for server in self._chunks)
        return min(self._newest.values()) if self._newest and answered else None

    def missing(self) -> list[tuple[str, list[int]]]:
        """Return the servers whose answer is not complete, and the chunks still to come."""
        return [(f"server-{server}", self._lacks(server)) for server in self._chunks if not self._done(server)]

    def take(self) -> tuple[dict[int, Any], dict[int, int]]:
        """Return the weights that have come since the last call, by chunk, and their versions by server.

        Ends the pull if all are here.
        """
        staged = {chunk: found for chunk, found in self._staged.items() if found is not None}
        for found in staged.values():
            if isinstance(found, InWeightBuffer) and not found.still and found.region == self._peers.region(found.server):
                self._weight_buffers[found.server] = found.weight_buffer
        if self.complete:
            if not self._full_precision:
                self._decoder.got_all(self._versions)
                self._has_still = True
            self.for_round, self._staged = None, {}
        else:
            self._staged.update(dict.fromkeys(staged))
        return staged, self._versions

    # ---- events

    def receive(self, server: str, number: int, body: Weights, frames: Frames) -> None:
        """Stage weights of server `number`, if they are of the round wanted. Raises WireError if they do not fit."""
        if body.for_round != self.for_round:
            return
        region = self._peers.region(number)
        found = frames
        if body.weight_buffer >= 0:
            found = [InWeightBuffer(number, body.weight_buffer, region)] * len(body.chunks)
        if len(found) != len(body.chunks):
            raise WireError(f"{server} sent {len(frames)} frames for {len(body.chunks)} chunks")
        for chunk in body.frozen_chunks:
            self._staged.setdefault(chunk, InWeightBuffer(number, body.frozen_buffer, region, still=True))
        self.bytes += sum(bytes_of(frame).nbytes for frame in frames)
        for chunk, one in zip(body.chunks, found, strict=True):
            if chunk not in self._staged:
                self._staged[chunk] = self._decoder.weights(body.version, chunk, one, chunk in body.coded)
        self._versions.setdefault(number, body.version)
        if frames:
            self._credits.append(Send(server, WeightsCredit(body.for_round, body.chunks)))
        if body.round_closed:
            self._closed_on.add(number)
            self._changed_frozen[number] = set(body.changed_frozen)
            self.settings = body.settings or self.settings
        failpoint("receiving", body.for_round)

    def expired(self, server: int, body: VersionExpired) -> None:
        """Note that a server has answered that the round is over, if it is the wanted one."""
        if body.for_round == self.for_round:
            self._newest[server] = body.newest

    def replaced(self, server: int) -> None:
        """Ask a server again that is a new process. Drop what the previous process sent, unless its answer was complete."""
        self._weight_buffers.pop(server, None)
        self._decoder.forget(server)
        self._asks_for_still = True
        if self.for_round is not None and not self._done(server):
            self._asked_at[server] = float("-inf")
            if server not in self._closed_on:
                self._versions.pop(server, None)
                for chunk in self._chunks.get(server, ()):
                    self._staged.pop(chunk.id, None)
