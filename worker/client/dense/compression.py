"""A worker's side of the codecs: what it pushes becomes frames, and frames of weights become weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from roundtable.common.codecs.chunks import coded_pieces
from roundtable.common.codecs.feedback import Feedback
from roundtable.common.codecs.registry import WEIGHT_SEED, for_pushes, for_weights, push_seed, sends_changes
from roundtable.common.config.settings import Settings
from roundtable.common.model.layout import Layout
from roundtable.common.model.partial_sum import Sum
from roundtable.common.model.tensor_bytes import from_frame, to_frame
from roundtable.common.protocol.messages.gradients import Push
from roundtable.common.protocol.transport import bytes_of
from roundtable.common.runtime.errors import WireError
from roundtable.worker.replica.mapped_weights import InWeightBuffer

#: Rounds, at most, of which it is known what has counted: far more than a server knows that of.
_REMEMBERED = 1000


class PushCoder:
    """Encodes contributions. The residual of a codec with error feedback is sent later: once, and only if the rest counted."""

    def __init__(self, settings: Settings, layout: Layout) -> None:
        self._settings = settings
        self._codec = for_pushes(settings, layout)
        self._feedback = Feedback()
        #: By round, chunks of contributions that have counted. A worker that does not know this may compute one of them again.
        #: The frame that it then sends does not count, though one of that name has: nothing may come or go with it.
        self._counted: dict[int, set[tuple[int, int, int]]] = {}
        #: By chunk, the pieces that are compressed, as bits.
        self._pieces = {
            chunk.id: sum(1 << chunk.pieces.index(piece) for piece in coded_pieces(layout, chunk)) for chunk in layout.chunks
        }

    def encode(self, push: Push, chunk: int, value: Sum) -> memoryview | None:
        """The frame of a chunk in `push`, with the value's scale in it, in memory of its own; None: it is sent as it is."""
        if self._codec is None or not self._codec.covers(chunk):
            return None
        if self._codec.codec.states and ~value.present & self._pieces[chunk]:
            return None  # what waits of a piece without a gradient would be sent and not be applied
        values = value.values if value.scale == 1.0 else value.values * value.scale
        seed = push_seed(self._settings, push.round, push.lo, push.hi, chunk)
        again = (chunk, push.lo, push.hi) in self._counted.get(push.round, ())
        coded = self._codec.encode(chunk, values, seed, None if again else self._feedback.state(chunk))
        if coded is None:
            return None
        if not again:
            self._feedback.sent(chunk, push.key, coded.state)
        return to_frame(coded.frame)

    def counted(self, push: Push, ignored: Collection[int]) -> None:
        """The frames of `push` have counted, but for the chunks `ignored`."""
        for chunk in push.coded:
            if chunk in ignored:
                self._feedback.drop(chunk, push.key)
            elif self._feedback.commit(chunk, push.key):
                if push.round not in self._counted:
                    self._counted = {old: of for old, of in self._counted.items() if old > push.round - _REMEMBERED}
                self._counted.setdefault(push.round, set()).add((chunk, push.lo, push.hi))

    @property
    def seconds(self) -> float:
        return self._codec.encode_seconds if self._codec is not None else 0.0


class WeightDecoder:
    """Decodes weights. Where their changes are sent it keeps the last ones, as they came: a script may write into its model."""

    def __init__(self, settings: Settings, layout: Layout) -> None:
        self._codec = for_weights(settings, layout)
        self._keeps = self._codec is not None and sends_changes(settings)
        self._server_of = {chunk.id: chunk.server for chunk in layout.chunks}
        #: The last weights that came whole, by chunk, and their versions by server; and those that are coming.
        self._kept: dict[int, Any] = {}
        self._versions: dict[int, int] = {}
        self._coming: dict[int, Any] = {}

    def holds(self, server: int) -> int:
        """The version of the server's weights that changes can be added to; -1: none."""
        return self._versions.get(server, -1)

    def forget(self, server: int) -> None:
        """The server is another process: it is to send its weights whole."""
        self._versions.pop(server, None)

    def begin(self) -> None:
        """Other weights are asked for."""
        self._coming = {}

    def weights(self, version: int, chunk: int, found: Any, is_coded: bool) -> Any:
        """The chunk's weights of `version`, which came as `found`: decoded, float32, if they are coded.

        Raises WireError for what is no frame of it or no change of what is held.
        """
        weights = self._decoded(version, chunk, found) if is_coded else found
        if self._keeps and self._codec is not None and self._codec.covers(chunk):
            self._coming[chunk] = weights
        return weights

    def _decoded(self, version: int, chunk: int, frame: Any) -> memoryview:
        if self._codec is None or chunk not in self._server_of:
            raise WireError(f"chunk {chunk} is not one that is compressed")
        values = self._codec.decode(chunk, bytes_of(frame), WEIGHT_SEED)
        if self._keeps:
            if chunk not in self._kept or self.holds(self._server_of[chunk]) != version - 1:
                raise WireError(f"chunk {chunk} came as its change since version {version - 1}, which is not held")
            torch.add(from_frame(self._kept[chunk], "float32", values.numel(), f"chunk {chunk}"), values, out=values)
        return to_frame(values)

    def got_all(self, versions: Mapping[int, int]) -> None:
        """All that was asked for is here, in `versions` by server."""
        mapped = {found.server for found in self._coming.values() if isinstance(found, InWeightBuffer)}
        self._kept, self._coming = self._coming, {}
        self._versions = {server: version for server, version in versions.items() if server not in mapped}

    @property
    def seconds(self) -> float:
        return self._codec.decode_seconds if self._codec is not None else 0.0
