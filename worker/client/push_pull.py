"""A worker's dealings with the servers: pushes until they are acknowledged, and the pull of the next weights.

A state machine without a socket, a thread or a clock. Invariants: a push is forgotten only when every part of it is
acknowledged, and where servers may be replaced (`--replicas`) when its round is over; what is sent again has the same bytes,
even if it was computed again meanwhile; no server has more than CREDIT_BYTES of pushes on their way to it, or one message; of
what waits, the chunks that the next forward needs first go first; staged weights all belong to the round last pulled; nothing
received touches the model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from roundtable.common.config.settings import Settings
from roundtable.common.model.layout import Chunk, Layout, message_batches, urgency
from roundtable.common.model.partial_sum import Sum
from roundtable.common.model.tensor_bytes import to_frame
from roundtable.common.protocol.effects import Send
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.gradients import Ack, Pull, Push, VersionExpired, Weights, WeightsCredit
from roundtable.common.protocol.messages.session import Traffic
from roundtable.common.protocol.messages.setup import OfferSharedMemory
from roundtable.common.protocol.transport import ASK_AGAIN_S, SEND_AGAIN_S, Frames, bytes_of
from roundtable.common.runtime.errors import WireError
from roundtable.common.runtime.failpoints import failpoint
from roundtable.worker.client.compression import PushCoder, WeightDecoder
from roundtable.worker.replica.gradient_buffers import GradientBuffer
from roundtable.worker.replica.mapped_weights import InWeightBuffer

#: Bytes of pushes that may be on their way to a server: enough to keep a fast network busy, and few enough that what is
#: needed sooner does not wait for long behind them.
CREDIT_BYTES = 8 << 20
#: Weight of the newest transfer in the moving average.
_NEWEST = 0.5


@dataclass
class _Outstanding:
    """A message until it is acknowledged, and the gradient buffer that its frames lie in.

    `early`: it does not count yet, so it is not sent again either.
    """

    server: int
    push: Push
    frames: Frames
    gradient_buffer: GradientBuffer | None
    #: None while it waits for its turn.
    sent_at: float | None = None
    #: Whether the server has said that the frames are there.
    arrived: bool = False
    #: Whether it was sent early, and so the gradient buffer may be used again as soon as it is acknowledged.
    was_early: bool = False

    @property
    def early(self) -> bool:
        return self.push.stage == "tentative"

    @property
    def bytes_under_way(self) -> int:
        return 0 if self.sent_at is None or self.arrived else sum(frame.nbytes for frame in self.frames)


class ParameterClient:
    """One worker's pushes and pulls, for all servers that take part in rounds."""

    def __init__(self, layout: Layout, settings: Settings, pulls_follow: bool) -> None:
        """`pulls_follow`: weights are asked for only when the server has all that was pushed to it, for they are to show it."""
        self._pulls_follow = pulls_follow
        self._coder = PushCoder(settings, layout)
        self._decoder = WeightDecoder(settings, layout)
        self._pushed_bytes = self._pulled_bytes = 0
        self._chunks: dict[int, list[Chunk]] = {server: layout.on(server) for server in layout.owners()}
        self._chunk_of = layout.chunks
        self._server_of = {chunk.id: chunk.server for chunk in layout.chunks}
        #: By server, the frozen chunks that it says something was contributed to: as with others, there are new weights every
        #: round. And whether weights of the others, which lie still, are here.
        self._moved: dict[int, set[int]] = {}
        self._has_still = False
        #: Whether the next pull is to bring them again, of all servers, as a tensor may lie on several.
        self._asks_for_still = False
        self._urgencies = {chunk.id: urgency(chunk) for chunk in layout.chunks}
        self._outstanding: list[_Outstanding] = []
        #: Where servers may be replaced: what was acknowledged of the open round and is still here.
        self._may_be_replaced = settings.replicas > 0
        self._repeatable: list[_Outstanding] = []
        #: What to ask servers that are other processes than before, and when each was asked; and how often each one's memory was
        #: another.
        self.share: OfferSharedMemory | None = None
        self.unknown: dict[int, float] = {}
        self._regions: dict[int, int] = {}
        #: Since when something has been outstanding, and whether some of that was sent early; and how long that lasts where
        #: nothing was, a moving average, seconds.
        self._busy_since: float | None = None
        self._overlaps = False
        self.transfer_s = 0.0
        #: Servers on this host.
        self.near: set[int] = set()
        #: The round whose weights are wanted; None before the first pull and when they have been taken.
        self.clock: int | None = None
        self._settled = False
        self._masters = False
        self._pulls = 0
        #: Weights by chunk, as frames or where they are (None: taken already), and the version of each server's.
        self._staged: dict[int, Any] = {}
        self._versions: dict[int, int] = {}
        #: Servers on which the round before is closed.
        self._closed_on: set[int] = set()
        #: Answers to servers that are still to be sent: which frames have come.
        self._answers: list[Send] = []
        #: By server that says that the round wanted is over: the newest round it knows.
        self._gone: dict[int, int] = {}
        #: When each server was last asked for weights (-inf: it is still to be), and when it was last heard of; those heard of
        #: since the last tick.
        self._asked_at: dict[int, float] = {}
        self._heard_at: dict[int, float] = {}
        self._heard: set[int] = set()
        #: Servers that read this worker's gradient buffers.
        self.readers: set[int] = set()
        #: Servers whose weight buffers this worker reads.
        self.read: set[int] = set()
        #: The weight buffer of each of them that the model is in.
        self._weight_buffers: dict[int, int] = {}

    # ---- pushing

    def push(
        self,
        push: Push,
        sums: Mapping[int, Sum],
        now: float,
        bases: Mapping[int, int] | None = None,
        gradient_buffer: GradientBuffer | None = None,
    ) -> list[Send]:
        """Send a contribution, `sums` by chunk; to servers that can read `gradient buffer`, in which they lie, only word of it.

        `push` holds what all messages of it share; its metrics go to server 0 alone. `bases` are the versions, by server,
        of the weights it was computed from. What of it is outstanding from an earlier time is not sent anew.
        """
        outstanding = [o.push for o in self._outstanding if o.push.key == push.key]
        under_way = {chunk for known in outstanding for chunk in known.chunks}
        tells = not any(known.metrics is not None for known in outstanding)
        for server, chunks in self._chunks.items():
            reads = gradient_buffer is not None and gradient_buffer.index >= 0 and server in self.readers
            ids = [chunk.id for chunk in chunks if chunk.id in sums and chunk.id not in under_way]
            metrics = push.metrics if server == 0 and tells else None
            if not ids and metrics is None:
                continue
            sent = [] if reads else [i for i in ids if not sums[i].is_nothing]
            coded = {i: frame for i in sent if (frame := self._coder.encode(push, i, sums[i])) is not None}
            frames = {i: coded[i] if i in coded else to_frame(sums[i].values) for i in sent}
            size = {i: frame.nbytes for i, frame in frames.items()}
            for batch in [ids] if reads else message_batches(ids, lambda i: size.get(i, 0)) or [[]]:  # noqa: B023
                message = msgspec.structs.replace(
                    push, chunks=batch, present=[sums[i].present for i in batch], base_version=(bases or {}).get(server, 0),
                    metrics=metrics, gradient_buffer=gradient_buffer.index if reads and gradient_buffer is not None else -1,
                    scale=max((sums[i].scale for i in batch), default=1.0), coded=[i for i in batch if i in coded],
                )  # fmt: skip
                metrics = None
                lies_in = None if batch and len(message.coded) == len(batch) else gradient_buffer
                self._outstanding.append(_Outstanding(server, message, [frames[i] for i in batch if i in frames], lies_in))
        return self._flow(now)

    def sends(self, chunk: int) -> bool:
        """Whether contributions to a chunk are sent, and not read from this worker's memory."""
        return self._server_of[chunk] not in self.readers

    @property
    def sends_any(self) -> bool:
        """Whether contributions to some chunk are sent."""
        return any(chunks and server not in self.readers for server, chunks in self._chunks.items())

    @property
    def sends_away(self) -> bool:
        """Whether contributions to some chunk are sent to another host."""
        return any(chunks and server not in self.readers | self.near for server, chunks in self._chunks.items())

    def push_early(
        self, push: Push, chunk: int, value: Sum, now: float, bases: Mapping[int, int], gradient_buffer: GradientBuffer
    ) -> list[Send]:
        """Send a contribution to one chunk, which is to count only when `settle` has said so; likewise."""
        if any(o.push.key == push.key and chunk in o.push.chunks for o in self._outstanding):
            return []
        self._overlaps = True
        server = self._server_of[chunk]
        coded = self._coder.encode(push, chunk, value)
        message = msgspec.structs.replace(
            push, stage="tentative", chunks=[chunk], present=[value.present], base_version=bases.get(server, 0),
            scale=value.scale, coded=[] if coded is None else [chunk],
        )  # fmt: skip
        frame, lies_in = (to_frame(value.values), gradient_buffer) if coded is None else (coded, None)
        self._outstanding.append(_Outstanding(server, message, [frame], lies_in))
        return self._flow(now)

    def settle(self, good: Collection[int], now: float) -> list[Send]:
        """Of all chunks that were sent early, those in `good` count; the others are not to."""
        for refused in [o for o in self._outstanding if o.early and o.push.chunks[0] not in good]:
            self._outstanding.remove(refused)
            self._coder.settled(refused.push, ignored=refused.push.chunks)
        effects = []
        for outstanding in (o for o in self._outstanding if o.early):
            outstanding.push = msgspec.structs.replace(outstanding.push, stage="complete")
            outstanding.was_early = True
            if outstanding.sent_at is not None:
                outstanding.sent_at = now
                effects.append(self._send(outstanding, msgspec.structs.replace(outstanding.push, stage="commit"), ()))
        return effects + self._flow(now)

    def _flow(self, now: float) -> list[Send]:
        """Send what there is credit for."""
        effects: list[Send] = []
        waiting = [o for o in self._outstanding if o.sent_at is None and o.server not in self.unknown]
        if not waiting:
            return effects
        under_way: dict[int, int] = dict.fromkeys(self._chunks, 0)
        for outstanding in self._outstanding:
            under_way[outstanding.server] += outstanding.bytes_under_way
        for outstanding in sorted(waiting, key=self._urgency):
            before = under_way[outstanding.server]
            if not outstanding.frames or not before or before + sum(f.nbytes for f in outstanding.frames) <= CREDIT_BYTES:
                outstanding.sent_at = now
                under_way[outstanding.server] += outstanding.bytes_under_way
                effects.append(self._send(outstanding, outstanding.push, outstanding.frames))
        return effects

    def _urgency(self, outstanding: _Outstanding) -> tuple[int, bool, int]:
        """Word of where things are goes first, then what the next round needs first."""
        push = outstanding.push
        return push.round, *(self._urgencies[push.chunks[0]] if outstanding.frames else (False, -1))

    def _send(self, outstanding: _Outstanding, push: Push, frames: Frames) -> Send:
        self._pushed_bytes += sum(frame.nbytes for frame in frames)
        return Send(f"server-{outstanding.server}", push, frames)

    def needs(self, gradient_buffer: GradientBuffer) -> bool:
        """Whether a push of what is in `gradient buffer` is not acknowledged yet."""
        return any(outstanding.gradient_buffer is gradient_buffer for outstanding in self._outstanding)

    @property
    def idle(self) -> bool:
        """Whether servers have all that was pushed."""
        return not self._outstanding

    def unacknowledged(self, round_: int) -> list[int]:
        """Micro-batches of `round_` that were pushed and may not have arrived everywhere."""
        pushes = (outstanding.push for outstanding in self._outstanding if not outstanding.early)
        return sorted({k for push in pushes if push.round == round_ for k in range(push.lo, push.hi)})

    # ---- pulling

    def pull(self, clock: int, settled: bool, now: float, masters: bool = False) -> list[Send]:
        """Ask for the weights to start round `clock` from, `masters`: for those that no codec has rounded; what was staged for
        another round is let go."""
        self.clock, self._settled, self._masters, self._gone = clock, settled, masters, {}
        self._pulls += 1
        self._repeatable = [o for o in self._repeatable if o.push.round >= clock - 1]
        self._decoder.begin()
        self._staged, self._versions, self._closed_on, self._moved = {}, {}, set(), {}
        self._has_still, self._asks_for_still = self._has_still and not self._asks_for_still, False
        self._asked_at = dict.fromkeys(self._chunks, float("-inf"))
        return self._ask(now)

    def want_all(self) -> None:
        """The next pull is to bring all weights, also those that lie still and have come before."""
        self._asks_for_still = True

    def _ask(self, now: float) -> list[Send]:
        """Ask the servers that were not asked yet or seem not to have heard it."""
        servers = [s for s, at in self._asked_at.items() if not self._done(s) and self._is_silent(s, at, now)]
        if self._pulls_follow:
            busy = {outstanding.server for outstanding in self._outstanding}
            servers = [server for server in servers if server not in busy]
        servers = [server for server in servers if server not in self.unknown]
        self._asked_at.update(dict.fromkeys(servers, now))
        return [
            Send(f"server-{server}", self._pull(server, [c.id for c in self._chunks[server] if c.id in self._staged]))
            for server in servers
        ]

    def _pull(self, server: int, have: list[int]) -> Pull:
        assert self.clock is not None
        shared, weight_buffer = server in self.read and not self._masters, self._weight_buffers.get(server, -1)
        holds = self._decoder.holds(server)
        still = not self._has_still
        return Pull(self.clock, self._pulls, have, self._settled, shared, weight_buffer, holds, self._masters, still)

    def _lacks(self, server: int) -> list[int]:
        """Chunks of a server that are to come and are not here, as far as it has told."""
        moved = self._moved.get(server, ())
        return [c.id for c in self._chunks[server] if c.id not in self._staged and (self._comes(c) or c.id in moved)]

    def _comes(self, chunk: Chunk) -> bool:
        return not chunk.frozen or not self._has_still

    def _done(self, server: int) -> bool:
        return server in self._closed_on and not self._lacks(server)

    @property
    def complete(self) -> bool:
        """Whether all weights asked for are here."""
        return self.clock is not None and all(self._done(server) for server in self._chunks)

    @property
    def receives(self) -> bool:
        """Whether there are weights that are sent here, and not read from a server's memory."""
        return any(chunks and server not in self.read for server, chunks in self._chunks.items())

    def usable(self, needed: Collection[int]) -> bool:
        """Whether the round can be begun, as nobody can be asked for anything of the one before and `needed` chunks are here."""
        return self.clock is not None and self._closed_on >= self._chunks.keys() and self.has(needed)

    def has(self, chunks: Collection[int]) -> bool:
        """Whether all of these chunks that were to come are here or were taken already."""
        return not self.to_come.intersection(chunks)

    @property
    def to_come(self) -> set[int]:
        """Chunks that the pull under way is still to bring."""
        if self.clock is None:
            return set()
        return {chunk for server in self._chunks for chunk in self._lacks(server)}

    @property
    def gone(self) -> bool:
        """Whether a server says that the round wanted is over."""
        return bool(self._gone)

    @property
    def over(self) -> int | None:
        """The round to ask for instead, once every server has answered: of the newest ones that they know, the earliest, for
        who goes further than that cannot be asked for what another server still lacks, and there may be nobody else. None where
        the round wanted is not over."""
        answered = all(server in self._gone or self._done(server) for server in self._chunks)
        return min(self._gone.values()) if self._gone and answered else None

    def missing(self) -> list[tuple[str, list[int]]]:
        """Servers whose answer is not complete, and the chunks still to come."""
        return [(f"server-{server}", self._lacks(server)) for server in self._chunks if not self._done(server)]

    def missing_text(self) -> str:
        """The same as it is told, with the round that the weights are to start."""
        parts = [f"{server} (chunks {', '.join(map(str, chunks))})" for server, chunks in self.missing()]
        return f"of round {self.clock} from {' and '.join(parts)}"

    def take(self) -> tuple[dict[int, Any], dict[int, int]]:
        """The weights that have come since the last call, by chunk, and their versions by server. Ends the pull when all are."""
        staged = {chunk: found for chunk, found in self._staged.items() if found is not None}
        for found in staged.values():
            if isinstance(found, InWeightBuffer) and not found.still and found.region == self._regions.get(found.server, 0):
                self._weight_buffers[found.server] = found.weight_buffer
        if self.complete:
            if not self._masters:
                self._decoder.got_all(self._versions)
                self._has_still = True
            self.clock, self._staged = None, {}
        else:
            self._staged.update(dict.fromkeys(staged))
        return staged, self._versions

    # ---- events

    def handle(self, server: str, body: Body, frames: Frames) -> None:
        """One message of a server. Raises WireError where it does not fit."""
        number = int(server.rpartition("-")[2])
        self._heard.add(number)
        match body:
            case Ack():
                self._acknowledged(number, body)
            case Weights() if body.for_round == self.clock:
                there = InWeightBuffer(number, body.weight_buffer, self._regions.get(number, 0))
                found = frames if body.weight_buffer < 0 else [there] * len(body.chunks)
                if len(found) != len(body.chunks):
                    raise WireError(f"{server} sent {len(frames)} frames for {len(body.chunks)} chunks")
                for chunk in body.frozen_chunks:
                    self._staged.setdefault(chunk, InWeightBuffer(number, body.frozen_buffer, there.region, still=True))
                self._pulled_bytes += sum(bytes_of(frame).nbytes for frame in frames)
                for chunk, one in zip(body.chunks, found, strict=True):
                    if chunk not in self._staged:
                        self._staged[chunk] = self._decoder.weights(body.version, chunk, one, chunk in body.coded)
                self._versions.setdefault(number, body.version)
                if frames:
                    self._answers.append(Send(server, WeightsCredit(body.for_round, body.chunks)))
                if body.round_closed:
                    self._closed_on.add(number)
                    self._moved[number] = set(body.changed_frozen)
                failpoint("receiving", body.for_round)
            case VersionExpired() if body.for_round == self.clock:
                self._gone[number] = body.newest
            case Weights() | VersionExpired():
                pass
            case _:
                raise WireError(f"a worker has no use for {type(body).__name__}")

    def tick(self, now: float) -> list[Send]:
        """What was not answered for too long is sent again, and what there is credit for is sent."""
        self._heard_at.update(dict.fromkeys(self._heard, now))
        self._heard.clear()
        if self._outstanding and self._busy_since is None:
            self._busy_since = now
        elif not self._outstanding and self._busy_since is not None:
            if not self._overlaps:
                self.transfer_s += _NEWEST * (now - self._busy_since - self.transfer_s)
            self._busy_since, self._overlaps = None, False
        effects, self._answers = self._answers, []
        for o in self._outstanding:
            if o.sent_at is not None and not o.early and self._is_silent(o.server, o.sent_at, now):
                o.sent_at = now
                effects.append(self._send(o, o.push, o.frames))
        for server in [server for server, asked_at in self.unknown.items() if now >= asked_at + ASK_AGAIN_S]:
            assert self.share is not None
            self.unknown[server] = now
            effects.append(Send(f"server-{server}", self.share))
        if self.clock is not None:
            effects += self._ask(now)
        return effects + self._flow(now)

    def _is_silent(self, server: int, since: float, now: float) -> bool:
        """Whether a server has answered nothing for so long that what it was sent at `since` may be lost."""
        return since == float("-inf") or now >= max(since, self._heard_at.get(server, since)) + SEND_AGAIN_S

    def _acknowledged(self, server: int, ack: Ack) -> None:
        for o in [o for o in self._outstanding if o.server == server and _is_meant(ack, o.push)]:
            if ack.tentative:
                o.arrived = True
            elif not o.early:
                self._outstanding.remove(o)
                self._coder.settled(o.push, ack.ignored)
                if self._may_be_replaced and not (o.was_early and o.gradient_buffer is not None):
                    self._repeatable.append(o)

    # ---- servers that are replaced

    def replaced(self, server: int) -> None:
        """A server is another process, which has closed as many rounds: of the open one it is to get all anew, and weights that
        are to come are asked for again."""
        if server not in self._chunks:
            return  # it has no part in rounds
        repeated = [o for o in self._repeatable if o.server == server]
        self._repeatable = [o for o in self._repeatable if o.server != server]
        self._outstanding += repeated
        for outstanding in (o for o in self._outstanding if o.server == server):
            outstanding.sent_at, outstanding.arrived = None, False
        self._heard_at.pop(server, None)
        self._weight_buffers.pop(server, None)
        self._decoder.forget(server)
        self._asks_for_still = True
        if self.clock is not None and not self._done(server):
            self._asked_at[server] = float("-inf")
            if server not in self._closed_on:
                self._versions.pop(server, None)
                for chunk in self._chunks.get(server, ()):
                    self._staged.pop(chunk.id, None)
        self.readers.discard(server)
        self.read.discard(server)
        if self.share is not None:
            self.unknown[server] = float("-inf")

    def met(self, server: int, reads: bool, region: int | None) -> None:
        """Note whether a server `reads` this worker's gradient buffers.

        Its memory, if this worker reads it, is number `region` of those that it has had.
        """
        self.unknown.pop(server, None)
        if region is not None:
            self._regions[server] = region
            self.read.add(server)
        if reads:
            self.readers.add(server)
            return
        for outstanding in self._outstanding:
            if (
                outstanding.server == server
                and outstanding.push.gradient_buffer >= 0
                and (gradient_buffer := outstanding.gradient_buffer) is not None
            ):
                given = zip(outstanding.push.chunks, outstanding.push.present, strict=True)
                full = [chunk for chunk, present in given if self._chunk_of[chunk].has_values(present)]
                outstanding.frames = [to_frame(gradient_buffer.chunks[chunk]) for chunk in full]
                outstanding.push = msgspec.structs.replace(outstanding.push, gradient_buffer=-1)

    @property
    def traffic(self) -> Traffic:
        """Of this worker so far."""
        return Traffic(self._pushed_bytes, self._pulled_bytes, self._coder.seconds, self._decoder.seconds)


def _is_meant(ack: Ack, push: Push) -> bool:
    whose = *push.key, push.chunks, push.metrics is not None
    return whose == (ack.round, ack.lo, ack.hi, ack.chunks, ack.metrics)
