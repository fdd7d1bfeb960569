"""Encode the contributions that a worker pushes, and decode the weights that it receives."""

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

#: Rounds whose counted contributions are remembered. Servers remember far fewer.
_REMEMBERED = 1000


class PushCoder:
    """Encodes contributions.

    With error feedback, the residual is added to a later contribution once, and only if this one counted.
    """

    def __init__(self, settings: Settings, layout: Layout) -> None:
        self._settings = settings
        self._codec = for_pushes(settings, layout)
        self._feedback = Feedback()
        #: By round: (chunk, lo, hi) of contributions that have counted. A worker that has not heard of that may compute one
        #: again. The
        #: second frame does not count, so it must neither use nor change a residual.
        self._counted: dict[int, set[tuple[int, int, int]]] = {}
        #: By chunk: the pieces that are compressed, as bits.
        self._pieces = {
            chunk.id: sum(1 << chunk.pieces.index(piece) for piece in coded_pieces(layout, chunk)) for chunk in layout.chunks
        }

    def encode(self, push: Push, chunk: int, value: Sum) -> memoryview | None:
        """Return the encoded frame of a chunk of `push`, multiplied by the sum's scale. Return None if the codec does not apply.

        The frame has memory of its own.
        """
        if self._codec is None or not self._codec.covers(chunk):
            return None
        if self._codec.codec.states and ~value.present & self._pieces[chunk]:
            return None  # the residual of a piece without a gradient would be sent, but not applied
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
        """Note that servers have counted the frames of `push`, except those of the chunks `ignored`."""
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
    """Decodes weights.

    If servers send changes, it keeps the last weights as they came, since a script may write into its model.
    """

    def __init__(self, settings: Settings, layout: Layout) -> None:
        self._codec = for_weights(settings, layout)
        self._keeps = self._codec is not None and sends_changes(settings)
        self._server_of = {chunk.id: chunk.server for chunk in layout.chunks}
        #: By chunk: the last complete weights.
        self._kept: dict[int, Any] = {}
        #: By server: the version of those weights.
        self._versions: dict[int, int] = {}
        #: By chunk: the weights received for the pull under way.
        self._coming: dict[int, Any] = {}

    def holds(self, server: int) -> int:
        """Return the version of the server's weights to which changes can be added, or -1 if there is none."""
        return self._versions.get(server, -1)

    def forget(self, server: int) -> None:
        """Forget the version of a server that is a new process, which must send its weights whole."""
        self._versions.pop(server, None)

    def begin(self) -> None:
        """Start a pull of other weights."""
        self._coming = {}

    def weights(self, version: int, chunk: int, found: Any, is_coded: bool) -> Any:
        """Return the weights of a chunk, received as `found`. If they are coded, decode them (float32).

        Raises WireError if the frame does not fit the chunk, or is the change of a version that is not held.
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
        """End a pull: all weights are here, in `versions` by server."""
        mapped = {found.server for found in self._coming.values() if isinstance(found, InWeightBuffer)}
        self._kept, self._coming = self._coming, {}
        self._versions = {server: version for server, version in versions.items() if server not in mapped}

    @property
    def seconds(self) -> float:
        return self._codec.decode_seconds if self._codec is not None else 0.0
