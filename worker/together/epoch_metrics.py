"""The means of what scripts log for their batches, which the coordinator has."""

from __future__ import annotations

from collections.abc import Callable

from roundtable.common.protocol.effects import COORDINATOR
from roundtable.common.protocol.messages.commit import Mean
from roundtable.worker.client.context import WorkerContext

#: Seconds after which the coordinator is asked again for a mean that is not complete.
_AGAIN_S = 0.1


class EpochMetrics:
    """Weighted means over a data epoch, by the metric's name. They are the same on every worker."""

    def __init__(self, context: WorkerContext, epoch: Callable[[], int]) -> None:
        """`epoch()` is the number of data epochs that are done."""
        self._context, self._epoch = context, epoch

    def __getitem__(self, name: str) -> float:
        """Return the mean over the newest data epoch that is done. Raises KeyError if there is none."""
        epoch = self._epoch() - 1
        mean = self.mean(epoch, name, waits=True) if epoch >= 0 else None
        if mean is None or mean.value is None:
            raise KeyError(
                f"no {name} was logged for the batches of data epoch {epoch}" if epoch >= 0 else "no data epoch is done"
            )
        return mean.value

    def mean(self, epoch: int, name: str, waits: bool) -> Mean:
        """Return the mean of a metric over a data epoch. If this does not wait, it may not be complete."""
        answer = self._context.request(
            COORDINATOR,
            Mean(epoch, name),
            lambda body: isinstance(body, Mean) and (body.epoch, body.name) == (epoch, name) and (body.complete or not waits),
            again=_AGAIN_S,
        )
        assert isinstance(answer, Mean)
        return answer
