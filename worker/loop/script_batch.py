"""A script in its loop over batches: the batch that it computes, the order of its calls, and its functions for rounds."""

from __future__ import annotations

import logging
from collections.abc import Callable

from roundtable.common.config.batch_plan import Segment, Task
from roundtable.common.runtime.errors import UsageError

log = logging.getLogger("roundtable.worker.run")

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


class RoundHooks:
    """The functions that a script has registered for the end of each round (`Run.on_round`).

    Each is called at most once for a round, in the order of the rounds, and in the order in which they were registered.
    """

    def __init__(self) -> None:
        self.functions: list[Callable[[], object]] = []
        #: Whether one of them runs now.
        self.running = False
        #: The round for whose end they were called last, or the one in which this worker began.
        self._called = 0
        #: The newest round that is dealt with: they were called for its end, or this worker has missed it.
        self._settled = 0
        self._has_warned = False

    def begin(self, round_: int) -> None:
        """Note that this worker takes part from `round_` on."""
        self._called = self._settled = round_

    def add(self, function: Callable[[], object], round_: int) -> None:
        """Register a function in `round_`. The end of an earlier round is past."""
        if not self.functions:
            self.begin(round_)
        self.functions.append(function)

    def due(self, round_: int) -> bool:
        """Return whether the functions are to be called before a micro-batch of `round_`."""
        return bool(self.functions) and round_ > self._settled

    def miss(self, round_: int) -> None:
        """Note that this worker does not have the weights with which `round_` begins."""
        self._settled = round_

    def call(self, round_: int, check: Callable[[str], None]) -> None:
        """Call the functions for the end of the round before `round_`. `check(whose)` follows each."""
        if round_ > self._called + 1 and not self._has_warned:
            self._has_warned = True
            log.warning(
                "this worker was so far behind the others that weights were gone: before the call with run.round %d, the "
                "functions of run.on_round() have missed %d rounds.", round_, round_ - self._called - 1,
            )  # fmt: skip
        self._called = self._settled = round_
        self.running = True
        try:
            for function in tuple(self.functions):
                function()
                check(f"{getattr(function, '__name__', type(function).__name__)}() of run.on_round()")
        finally:
            self.running = False


def data_epoch(segment: Segment | None, round_: int) -> int:
    """Return the data epoch that `round_` belongs to; after the last round, the number of epochs done."""
    if segment is None:
        return 0
    if round_ >= segment.end:
        return segment.first_epoch + segment.epochs
    return segment.round(max(round_, segment.first_round)).epoch
