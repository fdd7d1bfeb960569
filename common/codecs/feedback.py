"""The residuals, and other codec states, that a worker keeps for each chunk.

A frame may never be counted: it may be lost or refused, or another worker's frame may come first. So a frame takes the state
from which it was made. The server's answer decides which state comes back: the one before the frame, or the one after it. A
second frame of the chunk that is made meanwhile starts without a state, because the first frame's residual must not be sent
twice. States that come back are added up. This is right for residuals, which are sums of values that were not sent.
"""

from __future__ import annotations

from collections.abc import Hashable

from roundtable.common.codecs import State


class Feedback:
    """The state of each chunk's encoder. Tensors that it gets and returns are never written to.

    A chunk's state covers its runs (`coded_runs`), one after the other.
    """

    def __init__(self) -> None:
        self._states: dict[int, State] = {}
        #: By chunk and key of a frame under way: the states before and after it.
        self._pending: dict[tuple[int, Hashable], tuple[State | None, State]] = {}

    def state(self, chunk: int) -> State | None:
        """Return the state for the chunk's next frame, without a copy. Return None if there is none, or if a frame has it."""
        return self._states.get(chunk)

    def sent(self, chunk: int, key: Hashable, state: State | None) -> None:
        """Note that a frame called `key` was made from `state(chunk)` and is sent. `state` is the state after it, if any."""
        assert (chunk, key) not in self._pending
        if state is not None:
            self._pending[chunk, key] = self._states.pop(chunk, None), state

    def commit(self, chunk: int, key: Hashable) -> bool:
        """Note that the frame called `key` was counted, and keep the state after it. Return whether the frame was pending."""
        if (chunk, key) not in self._pending:
            return False
        self._add(chunk, self._pending.pop((chunk, key))[1])
        return True

    def drop(self, chunk: int, key: Hashable) -> None:
        """Note that the frame called `key` will not be counted, and keep the state before it. Other keys have no effect."""
        before, _ = self._pending.pop((chunk, key), (None, None))
        if before is not None:
            self._add(chunk, before)

    def _add(self, chunk: int, state: State) -> None:
        """Add `state` to the state of the chunk's next frame."""
        self._states[chunk] = _added(self._states.get(chunk, {}), state)


def _added(a: State, b: State) -> State:
    """Return the sum by name. A name that only one side has is taken from that side."""
    return {**a, **{name: a[name] + values if name in a else values for name, values in b.items()}}
