"""A worker of an attacker that has joined a run."""

from __future__ import annotations

import contextlib
import time

import zmq

from benchmarks.attacks.target import ENDS_S, STAY_S, Target
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.session import Goodbye, Hello, Welcome
from roundtable.common.protocol.transport import Frames, Stamp, dealer, new_incarnation, receive, send
from roundtable.common.runtime.errors import WireError


class Joined:
    """A worker that has joined, as any process that reaches the coordinator can. It sends only what its caller tells it to."""

    def __init__(self, coordinator: Target) -> None:
        self.coordinator = coordinator
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._stamp = Stamp("worker", "", 0, new_incarnation())
        self._sockets = {"coordinator": dealer(self._context, coordinator.address)}
        self.welcome = self._join()

    def _join(self) -> Welcome:
        deadline = time.monotonic() + ENDS_S
        while time.monotonic() < deadline:
            self.tell(Hello("worker", host="a stranger's"))
            self._sockets["coordinator"].poll(200)
            for body in self.heard("coordinator"):
                if isinstance(body, Welcome):
                    self._stamp.sender, self._stamp.run = body.process, body.run
                    for number, peer in enumerate(body.servers):
                        self._sockets[f"server-{number}"] = dealer(self._context, peer.address)
                    return body
        raise AssertionError("a worker more is not taken in")

    def heard(self, name: str) -> list[Body]:
        """Return the messages that a process has sent since the last call."""
        found: list[Body] = []
        with contextlib.suppress(WireError):
            while (frames := receive(self._sockets[name])) is not None:
                found.append(self._stamp.open(frames[0].buffer).read())
        return found

    def tell(self, body: Body, frames: Frames = (), to: str = "coordinator", sender: str = "", number: int | None = None) -> None:
        """Send a message, in the name of `sender` with that incarnation if given."""
        own = None if to == "coordinator" else self.welcome.ticket
        stamp = Stamp(sender, self._stamp.run, 0, number or 0) if sender else self._stamp
        send(self._sockets[to], stamp.encode(body, None if sender else own), frames, copy=True)

    @property
    def servers(self) -> list[str]:
        return [name for name in self._sockets if name != "coordinator"]

    def close(self) -> None:
        self.tell(Goodbye(early=True))
        self._context.destroy(linger=round(STAY_S * 1000))
