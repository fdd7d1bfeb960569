"""A worker's pushes until servers have acknowledged them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from roundtable.common.model.layout import Layout, message_batches, urgency
from roundtable.common.model.partial_sum import Sum
from roundtable.common.model.tensor_bytes import to_frame
from roundtable.common.protocol.effects import Send
from roundtable.common.protocol.messages.gradients import Ack, Push
from roundtable.common.protocol.transport import Frames
from roundtable.worker.client.dense.compression import PushCoder
from roundtable.worker.client.dense.servers import LastHeard, SharedMemoryPeers
from roundtable.worker.replica.gradient_buffers import GradientBuffer

#: Bytes of pushes that may be on their way to a server. They keep a fast network busy, and delay urgent chunks only a little.
CREDIT_BYTES = 8 << 20
#: Weight of the newest transfer in the moving average.
_NEWEST = 0.5


@dataclass
class _Outstanding:
    """A message until the server acknowledges it."""

    server: int
    push: Push
    frames: Frames
    #: Where the frames lie; None if they have memory of their own.
    gradient_buffer: GradientBuffer | None
    #: When the message was sent last; None while it waits for its turn.
    sent_at: float | None = None
    #: Whether the server has said that the frames have arrived.
    arrived: bool = False
    #: Whether the message was sent early. If so, its gradient buffer may be used again once it is acknowledged.
    was_early: bool = False

    @property
    def early(self) -> bool:
        """Whether the push does not count yet. Such a push is not sent again."""
        return self.push.stage == "tentative"

    @property
    def bytes_under_way(self) -> int:
        return 0 if self.sent_at is None or self.arrived else sum(frame.nbytes for frame in self.frames)


class PushQueue:
    """Sends pushes within each server's credit, the most urgent first, and repeats them until they are acknowledged."""

    def __init__(
        self, layout: Layout, coder: PushCoder, peers: SharedMemoryPeers, heard: LastHeard, may_be_replaced: bool
    ) -> None:
        """`may_be_replaced`: a new process may take a server's place, and then needs the pushes of the open round again."""
        self._coder, self._peers, self._heard = coder, peers, heard
        self._chunks = {server: layout.on(server) for server in layout.owners()}
        self._chunk_of = layout.chunks
        self._server_of = {chunk.id: chunk.server for chunk in layout.chunks}
        self._urgencies = {chunk.id: urgency(chunk) for chunk in layout.chunks}
        self._outstanding: list[_Outstanding] = []
        self._may_be_replaced = may_be_replaced
        #: If servers may be replaced: acknowledged pushes of the open round that can be sent again.
        self._repeatable: list[_Outstanding] = []
        #: Since when pushes have been outstanding without a break; None if none is.
        self._busy_since: float | None = None
        #: Whether one of those pushes was sent early.
        self._overlaps = False
        #: Seconds from the first push to the last acknowledgement, if none was sent early: a moving average.
        self.transfer_s = 0.0
        #: Bytes sent so far.
        self.bytes = 0

    # ---- what is sent

    def push(
        self,
        push: Push,
        sums: Mapping[int, Sum],
        now: float,
        bases: Mapping[int, int] | None = None,
        gradient_buffer: GradientBuffer | None = None,
    ) -> list[Send]:
        """Send a contribution; see `ParameterClient.push`."""
        outstanding = [o.push for o in self._outstanding if o.push.key == push.key]
        under_way = {chunk for known in outstanding for chunk in known.chunks}
        tells = not any(known.metrics is not None for known in outstanding)
        for server, chunks in self._chunks.items():
            new = {chunk.id: sums[chunk.id] for chunk in chunks if chunk.id in sums and chunk.id not in under_way}
            metrics = push.metrics if server == 0 and tells else None
            if new or metrics is not None:
                header = replace(push, metrics=metrics, base_version=(bases or {}).get(server, 0))
                self._add(server, header, new, gradient_buffer)
        return self.flow(now)

    def _add(self, server: int, push: Push, sums: dict[int, Sum], gradient_buffer: GradientBuffer | None) -> None:
        """Queue messages with `sums`. The first carries the metrics of `push`."""
        reads = gradient_buffer is not None and gradient_buffer.index >= 0 and server in self._peers.readers
        sent = [] if reads else [i for i, one in sums.items() if not one.is_nothing]
        coded = {i: frame for i in sent if (frame := self._coder.encode(push, i, sums[i])) is not None}
        frames = {i: coded[i] if i in coded else to_frame(sums[i].values) for i in sent}
        size, metrics = {i: frame.nbytes for i, frame in frames.items()}, push.metrics
        for batch in [[*sums]] if reads else message_batches([*sums], lambda i: size.get(i, 0)) or [[]]:
            message = replace(
                push, chunks=batch, present=[sums[i].present for i in batch], metrics=metrics,
                schedules=push.schedules if metrics is not None else None,
                gradient_buffer=gradient_buffer.index if reads and gradient_buffer is not None else -1,
                scale=max((sums[i].scale for i in batch), default=1.0), coded=[i for i in batch if i in coded],
            )  # fmt: skip
            metrics = None
            lies_in = None if batch and len(message.coded) == len(batch) else gradient_buffer
            self._outstanding.append(_Outstanding(server, message, [frames[i] for i in batch if i in frames], lies_in))

    def push_early(
        self, push: Push, chunk: int, value: Sum, now: float, bases: Mapping[int, int], gradient_buffer: GradientBuffer
    ) -> list[Send]:
        """Send a contribution to one chunk that does not count yet; see `ParameterClient.push_early`."""
        if any(o.push.key == push.key and chunk in o.push.chunks for o in self._outstanding):
            return []
        self._overlaps = True
        server = self._server_of[chunk]
        coded = self._coder.encode(push, chunk, value)
        message = replace(
            push, stage="tentative", chunks=[chunk], present=[value.present], base_version=bases.get(server, 0),
            scale=value.scale, coded=[] if coded is None else [chunk],
        )  # fmt: skip
        frame, lies_in = (to_frame(value.values), gradient_buffer) if coded is None else (coded, None)
        self._outstanding.append(_Outstanding(server, message, [frame], lies_in))
        return self.flow(now)

    def confirm(self, good: Collection[int], now: float) -> list[Send]:
        """Make the early pushes of chunks in `good` count, and drop the others."""
        for refused in [o for o in self._outstanding if o.early and o.push.chunks[0] not in good]:
            self._outstanding.remove(refused)
            self._coder.counted(refused.push, ignored=refused.push.chunks)
        effects = []
        for outstanding in (o for o in self._outstanding if o.early):
            outstanding.push = replace(outstanding.push, stage="complete")
            outstanding.was_early = True
            if outstanding.sent_at is not None:
                outstanding.sent_at = now
                effects.append(self._send(outstanding, replace(outstanding.push, stage="commit"), ()))
        return effects + self.flow(now)

    def flow(self, now: float) -> list[Send]:
        """Send the waiting messages for which there is credit."""
        effects: list[Send] = []
        waiting = [o for o in self._outstanding if o.sent_at is None and o.server not in self._peers.unanswered]
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
        """Return the key to sort by: messages without frames go first, then chunks that the next round needs first."""
        push = outstanding.push
        return push.round, *(self._urgencies[push.chunks[0]] if outstanding.frames else (False, -1))

    def _send(self, outstanding: _Outstanding, push: Push, frames: Frames) -> Send:
        self.bytes += sum(frame.nbytes for frame in frames)
        return Send(f"server-{outstanding.server}", push, frames)

    def tick(self, now: float) -> list[Send]:
        """Send again the messages that were not acknowledged in time."""
        self._measure(now)
        effects = []
        for o in self._outstanding:
            if o.sent_at is not None and not o.early and self._heard.is_silent(o.server, o.sent_at, now):
                o.sent_at = now
                effects.append(self._send(o, o.push, o.frames))
        return effects

    def _measure(self, now: float) -> None:
        """Measure how long servers take to acknowledge what was pushed."""
        if self._outstanding and self._busy_since is None:
            self._busy_since = now
        elif not self._outstanding and self._busy_since is not None:
            if not self._overlaps:
                self.transfer_s += _NEWEST * (now - self._busy_since - self.transfer_s)
            self._busy_since, self._overlaps = None, False

    # ---- questions

    def sends(self, chunk: int) -> bool:
        """Return whether contributions to a chunk are sent, rather than read from this worker's memory."""
        return self._server_of[chunk] not in self._peers.readers

    @property
    def sends_any(self) -> bool:
        """Whether contributions to some chunk are sent."""
        return any(chunks and server not in self._peers.readers for server, chunks in self._chunks.items())

    @property
    def sends_away(self) -> bool:
        """Whether contributions to some chunk are sent to another host."""
        here = self._peers.readers | self._peers.near
        return any(chunks and server not in here for server, chunks in self._chunks.items())

    def needs(self, gradient_buffer: GradientBuffer) -> bool:
        """Return whether a push of gradients in `gradient_buffer` is not acknowledged yet."""
        return any(outstanding.gradient_buffer is gradient_buffer for outstanding in self._outstanding)

    @property
    def busy(self) -> set[int]:
        """Servers that have not acknowledged all pushes."""
        return {outstanding.server for outstanding in self._outstanding}

    def unacknowledged(self, round_: int) -> list[int]:
        """Return the micro-batches of `round_` that were pushed but not acknowledged by all servers."""
        pushes = (outstanding.push for outstanding in self._outstanding if not outstanding.early)
        return sorted({k for push in pushes if push.round == round_ for k in range(push.lo, push.hi)})

    # ---- events

    def acknowledged(self, server: int, ack: Ack) -> None:
        """Remove the push that a server has acknowledged from the outstanding ones."""
        for o in [o for o in self._outstanding if o.server == server and _is_meant(ack, o.push)]:
            if ack.tentative:
                o.arrived = True
            elif not o.early:
                self._outstanding.remove(o)
                self._coder.counted(o.push, ack.ignored)
                if self._may_be_replaced and not (o.was_early and o.gradient_buffer is not None):
                    self._repeatable.append(o)

    def rounds_are_over(self, before: int) -> None:
        """Forget pushes of rounds before this one, because no server needs them again."""
        self._repeatable = [o for o in self._repeatable if o.push.round >= before]

    def replaced(self, server: int) -> None:
        """Queue all pushes of the open round again for a server that is a new process."""
        self._outstanding += [o for o in self._repeatable if o.server == server]
        self._repeatable = [o for o in self._repeatable if o.server != server]
        for outstanding in (o for o in self._outstanding if o.server == server):
            outstanding.sent_at, outstanding.arrived = None, False

    def send_what_it_cannot_read(self, server: int) -> None:
        """Put frames into messages that only said where the gradients lie, for a server that cannot read them."""
        for outstanding in self._outstanding:
            if (
                outstanding.server == server
                and outstanding.push.gradient_buffer >= 0
                and (gradient_buffer := outstanding.gradient_buffer) is not None
            ):
                given = zip(outstanding.push.chunks, outstanding.push.present, strict=True)
                full = [chunk for chunk, present in given if self._chunk_of[chunk].has_values(present)]
                outstanding.frames = [to_frame(gradient_buffer.chunks[chunk]) for chunk in full]
                outstanding.push = replace(outstanding.push, gradient_buffer=-1)


def _is_meant(ack: Ack, push: Push) -> bool:
    whose = *push.key, push.chunks, push.metrics is not None
    return whose == (ack.round, ack.lo, ack.hi, ack.chunks, ack.metrics)
