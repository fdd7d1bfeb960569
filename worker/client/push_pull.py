"""A worker's pushes to the servers, and its pulls of the weights.

A state machine without a socket, a thread or a clock. Its invariants:

- A push is forgotten only when every part of it is acknowledged. If servers may be replaced (`--replicas`), it is kept until
  its round is over.
- A push that is sent again has the same bytes, even if its micro-batch was computed again meanwhile.
- At most CREDIT_BYTES of pushes are on their way to a server, or one message.
- Of the chunks that wait, those that the next forward needs first go first.
- All weights kept here belong to the round of the newest pull.
- Nothing received touches the model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from roundtable.common.config.settings import Settings
from roundtable.common.model.layout import Layout
from roundtable.common.model.partial_sum import Sum
from roundtable.common.protocol.effects import Send, number_of
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.gradients import Ack, Push, UsedSettings, VersionExpired, Weights
from roundtable.common.protocol.messages.session import Traffic
from roundtable.common.protocol.transport import Frames
from roundtable.common.runtime.errors import WireError
from roundtable.worker.client.dense.compression import PushCoder, WeightDecoder
from roundtable.worker.client.dense.pull_session import PullSession
from roundtable.worker.client.dense.push_queue import PushQueue
from roundtable.worker.client.dense.servers import LastHeard, SharedMemoryPeers
from roundtable.worker.replica.gradient_buffers import GradientBuffer


class ParameterClient:
    """One worker's pushes and pulls of dense parameters, to and from all servers that have chunks."""

    def __init__(self, layout: Layout, settings: Settings, pulls_follow: bool, near: Collection[int] = ()) -> None:
        """Make the client of all servers that have chunks. `near` are those on this host.

        If `pulls_follow`, a server is asked for weights only once it has acknowledged all pushes, because the weights must show
        them.
        """
        self._owners = layout.owners()
        self._pulls_follow = pulls_follow
        self._coder = PushCoder(settings, layout)
        self._decoder = WeightDecoder(settings, layout)
        #: The servers that share memory with this worker.
        self.peers = SharedMemoryPeers(near)
        self._heard = LastHeard()
        self._pushes = PushQueue(layout, self._coder, self.peers, self._heard, may_be_replaced=settings.replicas > 0)
        self._pulls = PullSession(layout, self._decoder, self.peers, self._heard)

    # ---- pushing

    def push(
        self,
        push: Push,
        sums: Mapping[int, Sum],
        now: float,
        bases: Mapping[int, int] | None = None,
        gradient_buffer: GradientBuffer | None = None,
    ) -> list[Send]:
        """Send a contribution, `sums` by chunk. A server that can read `gradient_buffer`, where the sums lie, gets no frames.

        `push` holds what all messages of the contribution share. Its metrics go to server 0 alone. `bases` are the versions, by
        server, of the weights that it was computed from. A chunk that is outstanding already is not sent again.
        """
        return self._pushes.push(push, sums, now, bases, gradient_buffer)

    def push_early(
        self, push: Push, chunk: int, value: Sum, now: float, bases: Mapping[int, int], gradient_buffer: GradientBuffer
    ) -> list[Send]:
        """Send a contribution to one chunk before the micro-batch is done. It counts only after `confirm`. See also `push`."""
        return self._pushes.push_early(push, chunk, value, now, bases, gradient_buffer)

    def confirm(self, good: Collection[int], now: float) -> list[Send]:
        """Make the early pushes of chunks in `good` count, and drop the others."""
        return self._pushes.confirm(good, now)

    def sends(self, chunk: int) -> bool:
        """Return whether contributions to a chunk are sent, rather than read from this worker's memory."""
        return self._pushes.sends(chunk)

    @property
    def sends_any(self) -> bool:
        """Whether contributions to some chunk are sent."""
        return self._pushes.sends_any

    @property
    def sends_away(self) -> bool:
        """Whether contributions to some chunk are sent to another host."""
        return self._pushes.sends_away

    def needs(self, gradient_buffer: GradientBuffer) -> bool:
        """Return whether a push of gradients in `gradient_buffer` is not acknowledged yet."""
        return self._pushes.needs(gradient_buffer)

    @property
    def idle(self) -> bool:
        """Whether servers have acknowledged all pushes."""
        return not self._pushes.busy

    def unacknowledged(self, round_: int) -> list[int]:
        """Return the micro-batches of `round_` that were pushed but not acknowledged by all servers."""
        return self._pushes.unacknowledged(round_)

    @property
    def transfer_s(self) -> float:
        """Seconds that servers take to acknowledge a push, if nothing was sent early: a moving average."""
        return self._pushes.transfer_s

    # ---- pulling

    def pull(self, for_round: int, after_all_updates: bool, now: float, full_precision: bool = False) -> list[Send]:
        """Ask for the weights that round `for_round` starts from. With `full_precision`, no codec rounds them.

        Weights that were kept for another round are dropped.
        """
        self._pushes.rounds_are_over(before=for_round - 1)
        self._pulls.begin(for_round, after_all_updates, full_precision)
        return self._ask(now)

    def ask_for(self, for_round: int, now: float) -> list[Send]:
        """Ask whether servers still have the weights that round `for_round` starts from: `complete`, or `gone`."""
        self._pushes.rounds_are_over(before=for_round - 1)
        self._pulls.begin(for_round, False, full_precision=True, only_asks=True)
        return self._ask(now)

    def _ask(self, now: float) -> list[Send]:
        return self._pulls.ask(now, {*self.peers.unanswered, *(self._pushes.busy if self._pulls_follow else ())})

    def want_all(self) -> None:
        """Have the next pull bring all weights, also the frozen ones that have come before."""
        self._pulls.want_all()

    @property
    def for_round(self) -> int | None:
        """The round whose weights are wanted; None before the first pull and when they have been taken."""
        return self._pulls.for_round

    @property
    def complete(self) -> bool:
        """Whether all weights asked for are here."""
        return self._pulls.complete

    @property
    def receives(self) -> bool:
        """Whether some weights are sent here, rather than read from a server's memory."""
        return self._pulls.receives

    def usable(self, needed: Collection[int]) -> bool:
        """Return whether the round can start: all servers have closed the previous one, and the `needed` chunks are here."""
        return self._pulls.usable(needed)

    def has(self, chunks: Collection[int]) -> bool:
        """Return whether none of these chunks is still to come."""
        return self._pulls.has(chunks)

    @property
    def to_come(self) -> set[int]:
        """The chunks that the pull under way is still to bring."""
        return self._pulls.to_come

    @property
    def gone(self) -> bool:
        """Whether a server has answered that the wanted round is over."""
        return self._pulls.gone

    @property
    def over(self) -> int | None:
        """The round to ask for instead, once every server has answered; None if the wanted round is not over."""
        return self._pulls.over

    def missing(self) -> list[tuple[str, list[int]]]:
        """Return the servers whose answer is not complete, and the chunks still to come."""
        return self._pulls.missing()

    def missing_text(self) -> str:
        """Return the result of `missing` in words, with the round of the weights."""
        parts = [f"{server} (chunks {', '.join(map(str, chunks))})" for server, chunks in self.missing()]
        return f"of round {self.for_round} from {' and '.join(parts)}"

    @property
    def settings(self) -> UsedSettings | None:
        """The settings of the newest round that servers have told; None if they were never changed."""
        return self._pulls.settings

    def take(self) -> tuple[dict[int, Any], dict[int, int]]:
        """Return the weights that have come since the last call, by chunk, and their versions by server.

        Ends the pull if all are here.
        """
        return self._pulls.take()

    # ---- events

    def handle(self, server: str, body: Body, frames: Frames) -> None:
        """Take one message of a server. Raises WireError if it does not fit."""
        number = number_of(server)
        self._heard.hear(number)
        match body:
            case Ack():
                self._pushes.acknowledged(number, body)
            case Weights():
                self._pulls.receive(server, number, body, frames)
            case VersionExpired():
                self._pulls.expired(number, body)
            case _:
                raise WireError(f"a worker has no use for {type(body).__name__}")

    def tick(self, now: float) -> list[Send]:
        """Send again what was not answered in time, and send the pushes for which there is credit."""
        self._heard.tick(now)
        effects = self._pulls.credits() + self._pushes.tick(now) + self.peers.offers_due(now)
        return effects + self._ask(now) + self._pushes.flow(now)

    def replaced(self, server: int) -> None:
        """Note that a server is a new process, which has closed as many rounds as the previous one.

        It gets all pushes of the open round again. Weights that are still to come are asked for again.
        """
        if server not in self._owners:
            return  # it has no chunks
        self._pushes.replaced(server)
        self._heard.forget(server)
        self._pulls.replaced(server)
        self.peers.replaced(server)

    def on_shared_memory(self, server: int, reads: bool, region: int | None) -> None:
        """Take a server's answer to the offer to share memory.

        `reads`: the server reads this worker's gradient buffers. `region`: the number of the server's memory, counting every
        replacement, if this worker reads it.
        """
        self.peers.on_shared_memory(server, reads, region)
        if not reads:
            self._pushes.send_what_it_cannot_read(server)

    @property
    def traffic(self) -> Traffic:
        """This worker's traffic so far."""
        return Traffic(self._pushes.bytes, self._pulls.bytes, self._coder.seconds, self._decoder.seconds)
