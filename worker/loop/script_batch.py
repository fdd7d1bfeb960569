"""The batch that a script is computing, and the order of calls that the script must keep."""

from __future__ import annotations

from roundtable.common.config.batch_plan import Segment, Task
from roundtable.common.runtime.errors import UsageError

_STEP_MISSING = "opt.step() was not called for a batch: every batch of run.batches() needs backward() and step()."
_STEP_TOO_MUCH = "opt.step() was called without a batch: call it once for each batch of run.batches()."


class ScriptBatch:
    """The micro-batch that the script is computing, and the metrics that it logs of it."""

    def __init__(self) -> None:
        #: None between a step and the next batch.
        self.task: Task | None = None
        self.metrics: dict[str, float] = {}

    def hand_out(self, task: Task) -> None:
        """Note that the script gets this micro-batch."""
        self.task, self.metrics = task, {}

    def log(self, numbers: dict[str, float]) -> bool:
        """Keep metrics of the micro-batch. Return False if there is none."""
        if self.task is not None:
            self.metrics.update(numbers)
        return self.task is not None

    @property
    def in_hand(self) -> Task:
        """The current micro-batch. Raises UsageError if there is none: `step` then has nothing to contribute."""
        if self.task is None:
            raise UsageError(_STEP_TOO_MUCH)
        return self.task

    def take_back(self) -> None:
        """Note that the script has computed the micro-batch."""
        self.task = None

    def check_computed(self) -> None:
        """Raise UsageError if the script asks for the next batch without a step."""
        if self.task is not None:
            raise UsageError(_STEP_MISSING)


def data_epoch(segment: Segment | None, round_: int) -> int:
    """Return the data epoch that `round_` belongs to; after the last round, the number of epochs done."""
    if segment is None:
        return 0
    if round_ >= segment.end:
        return segment.first_epoch + segment.epochs
    return segment.round(max(round_, segment.first_round)).epoch
