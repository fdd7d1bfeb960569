"""What push codecs with error feedback have left out of contributions, where no worker has it: in snapshots, and of who left.

States of a chunk can be added up and divided, for codecs are fed the sum of what was left out and what is new; so a snapshot
holds one sum over all workers, and whoever goes on from it, however many there are, each send a part of it. A worker that
leaves hands over what it has, and the next one to ask for weights gets that. What a worker that is killed had is lost.

A state machine without a socket or a clock. Invariants: what a server has is with one worker or none; a message counts once.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from roundtable.common.codecs import State
from roundtable.common.codecs.chunks import ChunkCodec, coded_pieces
from roundtable.common.codecs.feedback import added
from roundtable.common.codecs.registry import for_pushes
from roundtable.common.config.settings import Settings
from roundtable.common.model.layout import Chunk, Layout
from roundtable.common.model.tensor_bytes import to_frame
from roundtable.common.protocol.messages.gradients import Residual
from roundtable.common.protocol.transport import SEND_AGAIN_S, Frames
from roundtable.common.runtime.errors import WireError
from roundtable.common.storage.tensor_file import Entry, TensorFiles

log = logging.getLogger("roundtable.ps.owed")

#: Seconds that a snapshot waits for workers to tell.
_PATIENCE_S = 60.0
#: What it is called in snapshots.
_NAME = "owed"

States = Mapping[int, State]


@dataclass
class _Handed:
    """What was sent to a worker and not acknowledged yet."""

    owed: Residual
    frames: Frames
    sent_at: float
    state: State


@dataclass
class _Cut:
    """A snapshot for which these workers have still to tell what they have left out, and what was told so far. `since` is when
    that was first looked at."""

    round: int
    awaits: set[str]
    told: dict[str, dict[int, State]] = field(default_factory=dict)
    parts: dict[str, dict[int, State]] = field(default_factory=dict)
    since: float | None = None


class ResidualStore:
    """One server's chunks."""

    def __init__(self, layout: Layout, chunks: Sequence[Chunk], settings: Settings) -> None:
        codec = for_pushes(settings, layout)
        self._codec: ChunkCodec | None = codec if codec is not None and codec.codec.states else None
        self._layout = layout
        self._chunks = {chunk.id: chunk for chunk in chunks}
        self._workers = settings.workers
        #: Shares that workers are to have, one each, and what is to be multiplied with each.
        self._shares: list[tuple[States, float]] = []
        #: What is on its way to workers, by worker and number.
        self._handed: dict[tuple[str, int], _Handed] = {}
        self._number = 0
        #: What those who are leaving have handed over so far; and who has handed over all.
        self._leaving: dict[str, dict[int, State]] = {}
        self._left: set[str] = set()
        self._cut: _Cut | None = None

    # ---- workers

    def takes(self, sender: str, body: Residual, frames: Frames) -> None:
        """A worker tells what it has left out. Raises WireError for what does not fit."""
        if self._codec is None or (body.of and body.chunk not in self._chunks) or body.of > len(self._chunks):
            raise WireError(f"{sender} says that it owes chunk {body.chunk}")
        cut = self._cut
        if body.checkpoint >= 0:
            if cut is None or body.checkpoint != cut.round or sender not in cut.awaits:
                return
            parts = cut.parts.setdefault(sender, {})
        else:
            if sender in self._left:
                return
            parts = self._leaving.setdefault(sender, {})
        if body.of:
            parts[body.chunk] = self._codec.state_of(body.chunk, body.names, frames)
        for number in body.taken:
            self.got(sender, number)
        if len(parts) < body.of:
            return
        if body.checkpoint >= 0 and cut is not None:
            cut.awaits.discard(sender)
            cut.told[sender] = cut.parts.pop(sender)
        else:
            self.has_left(sender)

    def has_left(self, worker: str) -> None:
        """It has told all, or never will. What has not arrived there is somebody else's."""
        self._left.add(worker)
        if (found := self._leaving.pop(worker, None)) is not None:
            self._shares.append((found, 1.0))
            if self._cut is not None:
                self._cut.told.pop(worker, None)  # for a snapshot it counts once
        handed = [self._handed.pop(key) for key in list(self._handed) if key[0] == worker]
        if handed:
            self._shares.append((_sum([{one.owed.chunk: one.state} for one in handed]), 1.0))
        if self._cut is not None:
            self._cut.awaits.discard(worker)

    def got(self, worker: str, number: int) -> None:
        """A worker has what it was sent."""
        self._handed.pop((worker, number), None)

    def hand_out(self, worker: str, now: float) -> list[tuple[Residual, Frames]]:
        """A worker asks for weights, so it will contribute: a share for it, if there is one."""
        if not self._shares or worker in self._left:
            return []
        states, factor = self._shares.pop(0)
        out = []
        for chunk, whole in states.items():
            state = _times(whole, factor)
            owed = Residual(chunk, list(state), len(states), self._number)
            self._handed[worker, self._number] = handed = _Handed(owed, [to_frame(v) for v in state.values()], now, state)
            self._number += 1
            out.append((handed.owed, handed.frames))
        return out

    def again(self, now: float) -> list[tuple[str, Residual, Frames]]:
        """What was handed out and not acknowledged for long."""
        out = []
        for (worker, _), handed in self._handed.items():
            if now >= handed.sent_at + SEND_AGAIN_S:
                handed.sent_at = now
                out.append((worker, handed.owed, handed.frames))
        return out

    # ---- snapshots

    def begin(self, round_: int, workers: Collection[str]) -> None:
        """A snapshot of `round_` is made: these workers are to tell."""
        self._cut = _Cut(round_, set(workers) - self._left if self._codec is not None else set())

    def asks(self, worker: str) -> int:
        """The round of the snapshot for which a worker has still to tell; -1: none."""
        return self._cut.round if self._cut is not None and worker in self._cut.awaits else -1

    def complete(self, now: float) -> bool:
        """Whether the snapshot has all that there will be."""
        cut = self._cut
        if cut is None or not cut.awaits:
            return True
        cut.since = now if cut.since is None else cut.since
        if now > cut.since + _PATIENCE_S:
            self.settle()
        return not cut.awaits

    def settle(self) -> None:
        """The snapshot cannot wait any longer."""
        if self._cut is not None and self._cut.awaits:
            log.warning(
                "the snapshot of round %d lacks what the codec of %s has left out",
                self._cut.round,
                ", ".join(sorted(self._cut.awaits)),
            )
            self._cut.awaits.clear()

    def end(self) -> Iterator[Entry]:
        """What is in the snapshot, which is complete: one sum."""
        cut, self._cut = self._cut, None
        told = cut.told if cut is not None else {}
        parts = list({**self._leaving, **told}.values())
        parts += [{c: _times(state, factor) for c, state in states.items()} for states, factor in self._shares]
        parts += [{handed.owed.chunk: handed.state} for handed in self._handed.values()]
        for chunk, state in _sum(parts).items():
            for key, start, end in self._places(chunk):
                for name, values in state.items():
                    yield Entry(f"{_NAME}/{name}/{key}", [end - start], [values[start:end]])

    def restore(self, files: TensorFiles) -> None:
        """Go on from a snapshot: what it has is dealt out to as many workers as the run is to have."""
        found: dict[int, State] = {}
        for chunk in self._chunks if self._codec is not None else ():
            places = self._places(chunk)
            for name in sorted({name for key, _, _ in places for name in files.below(_NAME, key)}):
                keys = [(f"{_NAME}/{name}/{key}", end - start) for key, start, end in places]
                parts = [files[key] if key in files else torch.zeros(numel) for key, numel in keys]
                found.setdefault(chunk, {})[name] = torch.cat(parts)
        self._shares = [(found, 1 / self._workers)] * self._workers if found else []

    def _places(self, chunk: int) -> list[tuple[str, int, int]]:
        """What the parts of a chunk's state are called, and where each begins and ends: wherever a tensor is cut, that does not
        depend on the number of servers."""
        out, at = [], 0
        for piece in coded_pieces(self._layout, self._chunks[chunk]):
            out.append((f"{self._layout.tensors[piece.tensor].name}#{piece.start}", at, at + piece.length))
            at += piece.length
        return out


def _times(state: State, factor: float) -> State:
    return state if factor == 1.0 else {name: values * factor for name, values in state.items()}


def _sum(parts: Sequence[States]) -> dict[int, State]:
    out: dict[int, State] = {}
    for states in parts:
        for chunk, state in states.items():
            out[chunk] = added(out.get(chunk, {}), state)
    return out
