"""The order of a stream's samples: a pure function of (seed, epoch) and the sizes of batches, computed place by place.

Three steps make it. Each is one to one, so each sample has one place in an epoch.

1. Shards are put in a row: shuffled, or as the stream has them.
2. If shards are shuffled, the row is cut into tracks, and each round takes some micro-batches of each track. So a round mixes as
   many shards as there are tracks, and a worker that keeps its share reads its own tracks alone, one sample after the other.
   These are the canonical nodes of MosaicML Streaming, without nodes.
3. Each block of `window` samples in a row is shuffled. A shuffle buffer of that size mixes about as well, but what comes out of
   it depends on where reading began. MosaicML Streaming calls this py1b.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass

import torch

from roundtable.common.config.batch_plan import Segment, derive_seed
from roundtable.worker.data.orders import generator
from roundtable.worker.data.streams.stream import Stream

#: Tracks of a round. A worker that is alone has as many shards open.
MOST_TRACKS = 64
#: Shuffled blocks of one epoch that are kept: one for each track, and one for each track that has come to the next.
_BLOCKS = 2 * MOST_TRACKS


@dataclass(frozen=True)
class StreamOrder:
    """The order that a loop over a stream has in each of its epochs."""

    stream: Stream
    seed: int
    #: Whether shards are shuffled.
    shuffle: bool
    #: How many samples in a row are shuffled.
    window: int

    @property
    def name(self) -> str:
        """The name that workers compare."""
        return f"{'shuffled shards' if self.shuffle else 'shards'} of {len(self.stream.shards)}, window {self.window}"

    @property
    def places(self) -> int:
        """Places that each epoch has."""
        return len(self.stream)

    def of(self, segment: Segment, epoch: int) -> EpochOrder:
        """Return the numbers of samples by their places in an epoch of `segment`."""
        tracks = tracks_of(segment, len(self.stream.shards)) if self.shuffle else 1
        return EpochOrder(self, epoch, segment.global_batch, tracks)

    def indices(self, epoch: int) -> EpochOrder:
        """Return the numbers of samples by their places in an epoch that has no rounds, such as an evaluation."""
        return EpochOrder(self, epoch, self.places, 1)


def tracks_of(segment: Segment, shards: int) -> int:
    """Return how many tracks a segment's rounds have: a divisor of their micro-batches, and at most one for each shard."""
    if segment.global_batch % segment.micro_batch:
        return 1
    micro_batches = segment.global_batch // segment.micro_batch
    return max(n for n in range(1, min(micro_batches, shards, MOST_TRACKS) + 1) if micro_batches % n == 0)


class EpochOrder:
    """The samples of one epoch by their places. `order[place]` is the number of a sample in the stream."""

    def __init__(self, order: StreamOrder, epoch: int, global_batch: int, tracks: int) -> None:
        self._order, self._stream, self._epoch = order, order.stream, epoch
        self._size, self._round, self._tracks = order.places, global_batch, tracks
        #: Samples that a round takes of a track, and samples that a track has. A round that is not whole has no tracks.
        self._part = global_batch // tracks
        self._track = order.places // global_batch * self._part
        shards = range(len(self._stream.shards))
        row = torch.randperm(len(shards), generator=generator(order.seed, epoch)).tolist() if order.shuffle else shards
        self._row: list[int] = [shard for shard in row if self._stream.lengths[shard]]
        self._ends = list(itertools.accumulate(self._stream.lengths[shard] for shard in self._row))
        self._blocks: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self._size:
            raise IndexError(place)
        in_row = self._shuffled(self._from_track(place))
        at = bisect.bisect_right(self._ends, in_row)
        shard = self._row[at]
        return self._stream.ends[shard] - (self._ends[at] - in_row)

    def _from_track(self, place: int) -> int:
        """Return the place in the row of shards."""
        if place >= self._track * self._tracks:  # in the last round, which is not whole
            return place
        round_, within = divmod(place, self._round)
        track, at = divmod(within, self._part)
        return track * self._track + round_ * self._part + at

    def _shuffled(self, place: int) -> int:
        """Return the place that a shuffled block has at `place`."""
        window = self._order.window
        if window == 1:
            return place
        block, within = divmod(place, window)
        if block not in self._blocks:
            if len(self._blocks) >= _BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            draw = torch.Generator().manual_seed(derive_seed(self._order.seed, "window", self._epoch, block))
            size = min(window, self._size - block * window)
            self._blocks[block] = torch.randperm(size, generator=draw, dtype=torch.int32)
        return block * window + int(self._blocks[block][within])
