"""Collects the trained model: asks the servers for its parts, and says where their bytes belong.

`ModelCollection` is a state machine without a socket, a clock or a disk. Invariants:

- a part is taken once, and only from the server that has it, while that server is asked for it;
- at most the credit's bytes are under way, or one part of each server;
- a missing part is asked for again, so a replacement server is asked too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from roundtable.common.model.layout import Layout
from roundtable.common.protocol.messages.saving import ModelPart, SendModel
from roundtable.common.protocol.transport import SEND_AGAIN_S, Frames, bytes_of
from roundtable.common.runtime.errors import WireError
from roundtable.ps.model_parts import Part, Span, parts_on, spans

#: At most this many bytes are under way from one server.
CREDIT_BYTES = 8 << 20
#: At most this many bytes are under way from all servers.
ALL_BYTES = 64 << 20
#: A server is asked for at most this many parts at once.
_MOST_PARTS = 1000
#: The wait before parts are asked for again doubles up to this many seconds.
_LONGEST_S = 20.0


@dataclass
class _Server:
    """The state of one server's parts."""

    #: By number: the parts that are missing.
    missing: dict[int, Part]
    #: By number: the bytes of the parts for which the server was asked.
    asked: dict[int, int] = field(default_factory=dict)
    #: When to ask the server again.
    again_at: float = float("-inf")
    #: Seconds to wait after the next request.
    patience_s: float = SEND_AGAIN_S


class ModelCollection:
    """Collects the model as it is after exactly `round_` rounds."""

    def __init__(self, layout: Layout, round_: int) -> None:
        self.round = round_
        self._layout = layout
        self._servers = {server: _Server(dict(enumerate(parts_on(layout, server)))) for server in range(layout.servers)}

    @property
    def complete(self) -> bool:
        """Return whether every part has been taken."""
        return not any(server.missing for server in self._servers.values())

    @property
    def missing(self) -> list[int]:
        """Return the servers that have not sent all their parts."""
        return [number for number, server in self._servers.items() if server.missing]

    def ask(self, now: float) -> list[tuple[int, SendModel]]:
        """Return (server, request) for each server to ask now."""
        out = []
        under_way = sum(sum(server.asked.values()) for server in self._servers.values())
        for number, server in self._servers.items():
            if server.asked and now >= server.again_at:
                server.again_at = now + server.patience_s
                server.patience_s = min(2 * server.patience_s, _LONGEST_S)
                out.append((number, SendModel(self.round, sorted(server.asked))))
            elif new := list(self._next(server, ALL_BYTES - under_way)):
                for part in new:
                    server.asked[part] = server.missing[part].bytes
                    under_way += server.asked[part]
                server.again_at = now + server.patience_s
                out.append((number, SendModel(self.round, new)))
        return out

    def replaced(self, server: int) -> None:
        """Note that another process replaces a server and must be asked at once."""
        one = self._servers[server]
        one.again_at, one.patience_s = float("-inf"), SEND_AGAIN_S

    def _next(self, server: _Server, room: int) -> Iterator[int]:
        """Yield the parts for which the server may be asked as well, within its credit and `room` bytes."""
        under_way, count = sum(server.asked.values()), len(server.asked)
        for number, part in server.missing.items():
            if number in server.asked:
                continue
            if count >= _MOST_PARTS or (under_way and part.bytes > min(room, CREDIT_BYTES - under_way)):
                return
            yield number
            under_way, room, count = under_way + part.bytes, room - part.bytes, count + 1

    def take(self, server: int, body: ModelPart, frames: Frames) -> list[tuple[Span, memoryview]]:
        """Return the bytes of a part and the places where they belong. The part stays missing until `took` is called.

        Raises WireError if the server was not asked for the part, or if the part has the wrong size.
        """
        one = self._servers.get(server)
        if one is None or body.round != self.round or body.part not in one.asked:
            raise WireError(f"server-{server} sent part {body.part} of round {body.round}, which it was not asked for")
        part = one.missing[body.part]
        data = [bytes_of(frame) for frame in frames]
        if sum(frame.nbytes for frame in data) != part.bytes:
            raise WireError(f"part {body.part} of server-{server} has not its {part.bytes} bytes")
        return list(_cut(data, spans(self._layout, server, part)))

    def took(self, server: int, body: ModelPart) -> None:
        """Note that the bytes that `take` returned are written."""
        one = self._servers[server]
        del one.missing[body.part], one.asked[body.part]
        one.patience_s = SEND_AGAIN_S


def _cut(data: Sequence[memoryview], places: Iterator[Span]) -> Iterator[tuple[Span, memoryview]]:
    """Yield the bytes of `data` cut at the ends of `places` as well, each with its place. `places` has as many bytes."""
    left = iter(data)
    frame = memoryview(b"")
    for place in places:
        start, end = place.start, place.start + place.length
        while start < end:
            while not frame:
                frame = next(left)
            taken = frame[: end - start]
            yield Span(place.of, start, len(taken)), taken
            start, frame = start + len(taken), frame[len(taken) :]
