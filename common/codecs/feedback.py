"""What a worker remembers for its codec: per chunk while it runs, per parameter where it must outlive the layout.

A frame that was sent may never be counted: it is lost, refused, or another worker's copy came first. So the state that it was
made from goes with it, and the server says what comes back: the state before it, or the one after it. A second frame of the
chunk that is made meanwhile starts from nothing, for what the first one has with it must not be sent twice; states that
come back are added up, which is right for all there are: sums of what was not sent, and velocities.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

from common.codecs import State
from common.codecs.chunks import coded_pieces
from common.errors import UsageError
from common.layout import Layout


class Feedback:
    """The state of each chunk's encoder. What is given to it and got from it is never written to.

    A chunk's state covers its runs (`coded_runs`), one after the other.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._pieces = {chunk.id: coded_pieces(layout, chunk) for chunk in layout.chunks}
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
        self._give_back(chunk, self._pending.pop((chunk, key))[1])
        return True

    def drop(self, chunk: int, key: Hashable) -> None:
        """The frame called `key` will not be counted. Does nothing if it is not pending."""
        before, _ = self._pending.pop((chunk, key), (None, None))
        if before is not None:
            self._give_back(chunk, before)

    def _give_back(self, chunk: int, state: State) -> None:
        self._states[chunk] = _added(self._states.get(chunk, {}), state)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What is to be sent as long as no frame under way counts, as copies: "<name of the state>/<name of the parameter>" ->
        flat float32 tensor.

        Elements of a parameter in chunks without a state are zero.
        """
        out: dict[str, torch.Tensor] = {}
        committed = dict(self._states)
        for (chunk, _), (before, _) in self._pending.items():
            committed[chunk] = _added(committed.get(chunk, {}), before or {})
        for chunk, states in committed.items():
            for name, values in states.items():
                at = 0
                for piece in self._pieces[chunk]:
                    spec = self._layout.tensors[piece.tensor]
                    key = f"{name}/{spec.name}"
                    if key not in out:
                        out[key] = torch.zeros(spec.numel)
                    out[key][piece.start : piece.start + piece.length] = values[at : at + piece.length]
                    at += piece.length
        return out

    def load_state_dict(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state_dict` of any layout of the same model gave; forgets all else. Copies only where pieces join.

        Raises UsageError for what is of another model.
        """
        coded = {self._layout.tensors[piece.tensor].name for pieces in self._pieces.values() for piece in pieces}
        numels = {spec.name: spec.numel for spec in self._layout.tensors if spec.name in coded}
        for key, values in saved.items():
            parameter = key.partition("/")[2]
            if numels.get(parameter) != values.numel() or values.dtype != torch.float32:
                raise UsageError(
                    f"The codec's state '{key}' ({values.numel()} elements, {values.dtype}) fits no compressed parameter: "
                    "resume with the model that it was saved with."
                )
        self._pending = {}
        states = {chunk: self._assembled(chunk, saved) for chunk in self._pieces}
        self._states = {chunk: state for chunk, state in states.items() if state}

    def _assembled(self, chunk: int, saved: Mapping[str, torch.Tensor]) -> State:
        """The chunk's part of what was saved; parameters without a state that others in the chunk have get zeros."""
        state: State = {}
        for name in sorted({key.partition("/")[0] for key in saved}):
            parts, found = [], False
            for piece in self._pieces[chunk]:
                whole = saved.get(f"{name}/{self._layout.tensors[piece.tensor].name}")
                found = found or whole is not None
                parts.append(
                    torch.zeros(piece.length) if whole is None else whole.view(-1)[piece.start : piece.start + piece.length]
                )
            if found:
                state[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return state


def _added(a: State, b: State) -> State:
    """The sum by name; where only one has a name, that one."""
    return {**a, **{name: a[name] + values if name in a else values for name, values in b.items()}}
