"""What a worker remembers for its codec, by chunk.

A frame that was sent may never be counted: it is lost, refused, or another worker's copy came first. So the state that it was
made from goes with it, and the server says what comes back: the state before it, or the one after it. A second frame of the
chunk that is made meanwhile starts from nothing, for what the first one has with it must not be sent twice; states that
come back are added up, which is right for all there are: sums of what was not sent, and velocities.
"""

from __future__ import annotations

from collections.abc import Hashable

from roundtable.common.codecs import State


class Feedback:
    """The state of each chunk's encoder. What is given to it and got from it is never written to.

    A chunk's state covers its runs (`coded_runs`), one after the other.
    """

    def __init__(self) -> None:
        self._states: dict[int, State] = {}
        #: By chunk and key of a frame under way: the state before it and the state after it.
        self._pending: dict[tuple[int, Hashable], tuple[State | None, State]] = {}

    def state(self, chunk: int) -> State | None:
        """What to encode the chunk's next frame from; None: nothing was counted yet, or it is with a frame. Not copied."""
        return self._states.get(chunk)

    def sent(self, chunk: int, key: Hashable, state: State | None) -> None:
        """A frame called `key` was made from `state(chunk)` and is sent; it leads to `state`, if to any."""
        assert (chunk, key) not in self._pending
        if state is not None:
            self._pending[chunk, key] = self._states.pop(chunk, None), state

    def commit(self, chunk: int, key: Hashable) -> bool:
        """The frame called `key` was counted: what it left out is to be sent now. Whether it was pending."""
        if (chunk, key) not in self._pending:
            return False
        self._add(chunk, self._pending.pop((chunk, key))[1])
        return True

    def drop(self, chunk: int, key: Hashable) -> None:
        """The frame called `key` will not be counted. Does nothing if it is not pending."""
        before, _ = self._pending.pop((chunk, key), (None, None))
        if before is not None:
            self._add(chunk, before)

    def _add(self, chunk: int, state: State) -> None:
        """Have the chunk's next frame send `state` as well."""
        self._states[chunk] = _added(self._states.get(chunk, {}), state)


def _added(a: State, b: State) -> State:
    """The sum by name; where only one has a name, that one."""
    return {**a, **{name: a[name] + values if name in a else values for name, values in b.items()}}
