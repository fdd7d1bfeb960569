"""How fast a worker computes."""

from __future__ import annotations

#: Weight of the newest micro-batch in the moving averages of speed.
_NEWEST = 0.2


class Throughput:
    """Moving averages over micro-batches."""

    def __init__(self) -> None:
        #: Seconds for one micro-batch.
        self.seconds = 0.0
        #: Samples per second.
        self.rate = 0.0

    def measured(self, seconds: float, samples: int) -> None:
        """Count one micro-batch."""
        weight = _NEWEST if self.seconds else 1.0
        self.seconds += weight * (seconds - self.seconds)
        self.rate += weight * (samples / max(seconds, 1e-9) - self.rate)
