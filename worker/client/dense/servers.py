"""The servers as a worker knows them: which ones share memory with it, and when it last heard from each."""

from __future__ import annotations

from collections.abc import Collection

from roundtable.common.protocol.effects import Send
from roundtable.common.protocol.messages.setup import OfferSharedMemory
from roundtable.common.protocol.transport import ASK_AGAIN_S, SEND_AGAIN_S


class SharedMemoryPeers:
    """The servers on this host, and those of them that this worker shares memory with."""

    def __init__(self, near: Collection[int]) -> None:
        """`near`: the servers on this host."""
        self.near = frozenset(near)
        #: Servers that read this worker's gradient buffers.
        self.readers: set[int] = set()
        #: Servers whose weight buffers this worker reads.
        self.readable: set[int] = set()
        #: The message that asks a server to share memory; None if this run shares none.
        self.offer: OfferSharedMemory | None = None
        #: By server that is a new process and has not answered the offer: when it was last asked.
        self.unanswered: dict[int, float] = {}
        #: By server: how many times its memory was replaced.
        self._regions: dict[int, int] = {}

    def region(self, server: int) -> int:
        """Return the number of the server's memory among those that it has had."""
        return self._regions.get(server, 0)

    def on_shared_memory(self, server: int, reads: bool, region: int | None) -> None:
        """Take a server's answer: whether it `reads` gradient buffers, and the `region` that this worker reads, if any."""
        self.unanswered.pop(server, None)
        if region is not None:
            self._regions[server] = region
            self.readable.add(server)
        if reads:
            self.readers.add(server)

    def replaced(self, server: int) -> None:
        """Share no memory with a server that is a new process, until it has answered the offer."""
        self.readers.discard(server)
        self.readable.discard(server)
        if self.offer is not None:
            self.unanswered[server] = float("-inf")

    def offers_due(self, now: float) -> list[Send]:
        """Return the offer for each new process that has not answered for a while."""
        if self.offer is None:
            return []
        due = [server for server, asked_at in self.unanswered.items() if now >= asked_at + ASK_AGAIN_S]
        self.unanswered.update(dict.fromkeys(due, now))
        return [Send(f"server-{server}", self.offer) for server in due]


class LastHeard:
    """When each server was last heard from."""

    def __init__(self) -> None:
        self._heard_at: dict[int, float] = {}
        #: Servers heard from since the last tick. A tick brings the time.
        self._since_tick: set[int] = set()

    def hear(self, server: int) -> None:
        """Note that a message of a server has come."""
        self._since_tick.add(server)

    def tick(self, now: float) -> None:
        """Give this time to the messages that have come since the last tick."""
        self._heard_at.update(dict.fromkeys(self._since_tick, now))
        self._since_tick.clear()

    def forget(self, server: int) -> None:
        """Forget when the previous process of a server was heard."""
        self._heard_at.pop(server, None)

    def is_silent(self, server: int, since: float, now: float) -> bool:
        """Return whether a message sent at time `since` may be lost, because the server has sent nothing for too long."""
        return since == float("-inf") or now >= max(since, self._heard_at.get(server, since)) + SEND_AGAIN_S
