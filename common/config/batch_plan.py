"""The samples of every micro-batch of every round. All processes compute the same plan.

A segment is one call of `Run.batches`: some data epochs over one data set. Rounds and data epochs are numbered through the whole
run, over all segments.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec

from roundtable.common.config.field_types import Count, Positive

#: Micro-batches that a round may have.
MOST_MICRO_BATCHES = 1 << 20


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """Epochs of `samples` samples each, starting at `first_round` and `first_epoch` of the run."""

    index: Count
    first_round: Count
    first_epoch: Count
    samples: Positive
    global_batch: Positive
    micro_batch: Positive
    epochs: Positive
    #: Rounds in this segment: all its data epochs, or fewer if the run's limit of rounds comes first.
    rounds: Count
    #: Samples that each micro-batch has at least.
    min_micro_batch: Positive = 1

    @property
    def end(self) -> int:
        """One past this segment's last round."""
        return self.first_round + self.rounds

    @property
    def passes(self) -> int:
        """The number of data epochs that start, which `--rounds` may make fewer than `epochs`."""
        return -(-self.rounds // self.rounds_per_epoch)

    def spare_workers(self, workers: int) -> str:
        """Return a sentence if so many workers share the micro-batches of a round and some of them get none; else ''."""
        micro_batches = -(-self.global_batch // self.micro_batch)
        if workers <= micro_batches:
            return ""
        return (
            f"{workers} workers but only {micro_batches} micro-batches per round ({self.global_batch}/{self.micro_batch}): at "
            f"most {micro_batches} can work at a time. Use --global-batch {workers * self.micro_batch} or --micro-batch "
            f"{max(1, self.global_batch // workers)}."
        )

    def follows(self, before: Segment | None) -> bool:
        """Return whether the segment's numbers continue those of `before`, the previous segment, and are valid."""
        first = (0, 0, 0) if before is None else (before.index + 1, before.end, before.first_epoch + before.epochs)
        fits = self.rounds <= self.rounds_per_epoch * self.epochs and self.global_batch <= MOST_MICRO_BATCHES * self.micro_batch
        sizes = {min(self.global_batch, self.samples), self.samples % self.global_batch}
        fits = fits and all(most_samples(size, self.micro_batch, self.min_micro_batch) == size for size in sizes)
        return fits and (self.index, self.first_round, self.first_epoch) == first

    @property
    def rounds_per_epoch(self) -> int:
        return -(-self.samples // self.global_batch)

    @property
    def total_samples(self) -> int:
        """The samples that all rounds of the segment use."""
        whole, rest = divmod(self.rounds, self.rounds_per_epoch)
        return whole * self.samples + min(rest * self.global_batch, self.samples)

    @property
    def micro_batches(self) -> int:
        """The micro-batches of all rounds of the segment."""
        epochs, rest = divmod(self.rounds, self.rounds_per_epoch)
        return epochs * self._per_epoch + rest * self._per_round

    def round_of(self, number: int) -> int:
        """Return the round that has micro-batch `number` of the segment, counted from 0 in the order of the plan."""
        epoch, rest = divmod(number, self._per_epoch)
        step = min(rest // self._per_round, self.rounds_per_epoch - 1)
        return self.first_round + epoch * self.rounds_per_epoch + step

    @property
    def _per_round(self) -> int:
        """The micro-batches of each round except the last one of a data epoch."""
        return -(-self.global_batch // self.micro_batch)

    @property
    def _per_epoch(self) -> int:
        last = self.samples - (self.rounds_per_epoch - 1) * self.global_batch
        return (self.rounds_per_epoch - 1) * self._per_round + -(-last // self.micro_batch)

    def rounds_by_size(self, first: int) -> dict[int, int]:
        """Return the numbers of micro-batches that rounds from `first` on have, each with the number of such rounds."""
        done, left = max(0, first - self.first_round), max(0, self.end - max(first, self.first_round))
        last = self.rounds // self.rounds_per_epoch - done // self.rounds_per_epoch if left else 0
        last_size = self._per_epoch - (self.rounds_per_epoch - 1) * self._per_round
        sizes = {self._per_round: left - last}
        sizes[last_size] = sizes.get(last_size, 0) + last
        return {size: rounds for size, rounds in sizes.items() if rounds}

    def round(self, index: int) -> Round:
        """Return the plan of round `index`, counted through the run. Raises IndexError outside the segment."""
        if not self.first_round <= index < self.end:
            raise IndexError(f"round {index} is not in rounds {self.first_round}..{self.end - 1}")
        epoch, step = divmod(index - self.first_round, self.rounds_per_epoch)
        start = step * self.global_batch
        return Round(
            index=index,
            epoch=self.first_epoch + epoch,
            start=start,
            samples=min(self.global_batch, self.samples - start),
            micro_batch=self.micro_batch,
            min_micro_batch=self.min_micro_batch,
        )


@dataclass(frozen=True)
class Round:
    """One global batch: `samples` samples from place `start` of the data epoch's order, cut into micro-batches.

    If the last micro-batch would have fewer than `min_micro_batch` samples, the one before it gives it some.
    """

    index: int
    epoch: int
    start: int
    samples: int
    micro_batch: int
    min_micro_batch: int = 1

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches, K. The last one may be short."""
        return -(-self.samples // self.micro_batch)

    def places(self, k: int) -> range:
        """Return the places in the data epoch's order that micro-batch `k` takes."""
        return range(self.start + self._before(k), self.start + self._before(k + 1))

    def samples_in(self, lo: int, hi: int) -> int:
        """Return the number of samples in micro-batches lo..hi-1."""
        return self._before(hi) - self._before(lo)

    def _before(self, k: int) -> int:
        """Return the samples in micro-batches 0..k-1."""
        start = min(k * self.micro_batch, self.samples)
        if 0 < self.samples - start < self.min_micro_batch and k:
            return self.samples - self.min_micro_batch
        return start


def most_samples(samples: int, micro_batch: int, min_micro_batch: int) -> int:
    """Return how many of `samples` fit into micro-batches that have at least `min_micro_batch` samples each."""
    last = samples % micro_batch
    if last == 0 or last >= min_micro_batch:
        return samples
    can_borrow = samples > micro_batch and micro_batch + last >= 2 * min_micro_batch
    return samples if can_borrow else samples - last


def samples_per_epoch(places: int, global_batch: int, micro_batch: int, min_micro_batch: int, drop_last: bool) -> int:
    """Return how many samples of an order with `places` places an epoch uses.

    `drop_last` leaves out the last round if it is not whole. `min_micro_batch` leaves out a few samples of it if they would make
    a micro-batch that is too small.
    """
    last = places % global_batch
    return places - last + (0 if drop_last else most_samples(last, micro_batch, min_micro_batch))


def make_segment(
    *,
    before: Segment | None,
    samples: int,
    global_batch: int,
    micro_batch: int,
    epochs: int,
    round_limit: int | None,
    min_micro_batch: int = 1,
) -> Segment:
    """Return the segment that follows `before`, or the first one if that is None. `round_limit` counts the whole run's rounds."""
    first_round = before.end if before else 0
    rounds = -(-samples // global_batch) * epochs
    if round_limit is not None:
        rounds = max(0, min(rounds, round_limit - first_round))
    return Segment(
        index=before.index + 1 if before else 0,
        first_round=first_round,
        first_epoch=before.first_epoch + before.epochs if before else 0,
        samples=samples,
        global_batch=global_batch,
        micro_batch=micro_batch,
        epochs=epochs,
        rounds=rounds,
        min_micro_batch=min_micro_batch,
    )


def derive_seed(seed: int, purpose: str, *place: int) -> int:
    """Return a 63-bit seed for one purpose at one place of the run, such as ('sample', epoch, index).

    It is the same everywhere.
    """
    text = ":".join([str(seed), purpose, *map(str, place)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Task:
    """Micro-batch `k` of `round`."""

    round: int
    k: int
