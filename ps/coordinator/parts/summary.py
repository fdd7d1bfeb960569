"""Takes the metrics that scripts log, and writes summary.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from roundtable.common.protocol.messages.commit import Metrics
from roundtable.common.protocol.messages.session import Traffic
from roundtable.common.protocol.messages.setup import Accepted, Request
from roundtable.common.runtime.errors import ClusterError, WireError
from roundtable.common.runtime.failpoints import failpoint
from roundtable.ps.coordinator.context import Received, RunContext
from roundtable.ps.coordinator.parts.departures import Departures
from roundtable.ps.coordinator.parts.model import ModelCollector
from roundtable.ps.coordinator.parts.planning import Planning
from roundtable.ps.coordinator.parts.status import StatusReporter
from roundtable.ps.coordinator.recovery import RestoredRun
from roundtable.ps.coordinator.results import write_summary
from roundtable.ps.coordinator.summary_metrics import Measured, measured, results
from roundtable.ps.token_bucket import Allowance

#: Bytes of metrics that a worker may log per second, and in a burst.
_METRICS_BYTES_S, _METRICS_BYTES = 100e3, 4e6
#: Bytes of a row of metrics, besides the metric's name.
_ROW_BYTES = 100


class RunSummary:
    """Takes metrics of scripts, and makes the summary at the end."""

    def __init__(
        self, context: RunContext, model: ModelCollector, departures: Departures, planning: Planning, status: StatusReporter
    ) -> None:
        self._context = context
        self._model = model
        self._departures = departures
        self._planning = planning
        self._status = status
        #: Samples of the run before the checkpoint from which it was resumed.
        self._samples_before = context.ledger.totals.samples
        #: (incarnation of the worker, number) of the metrics that are in the event log.
        self._seen_metrics: set[tuple[int, int]] = set()
        #: Limits the bytes that each worker writes to the event log.
        self._metrics_bytes = Allowance(_METRICS_BYTES_S, _METRICS_BYTES)
        #: The newest accuracy that a script measured.
        self._accuracy: Measured | None = None

    def recover(self, restored: RestoredRun) -> None:
        """Take over the metrics of the coordinator before."""
        self._samples_before, self._seen_metrics, self._accuracy = restored.samples_before, restored.metrics, restored.accuracy

    def log_metrics(self, message: Received[Metrics]) -> None:
        """Write a script's metrics to the event log, once. Raises WireError if the worker logs too much."""
        context, worker, metrics, now = self._context, message.member, message.body, message.now
        if (worker.incarnation, metrics.id) in self._seen_metrics:
            context.journal.promise(message.route, Accepted(Request.METRICS, metrics.id))
            return
        if not self._metrics_bytes.take(worker.name, sum(_ROW_BYTES + len(name) for name in metrics.values), now):
            raise WireError(f"{worker.name} logs more metrics than can be written, and must send them again later", "flood")
        context.journal.promise(message.route, Accepted(Request.METRICS, metrics.id))
        self._seen_metrics.add((worker.incarnation, metrics.id))
        context.progressed_at = now
        self._accuracy = measured(metrics.values, metrics.round) or self._accuracy
        for name, value in metrics.values.items():
            context.log.metric(metrics.round, worker.name, name, value, worker.incarnation, metrics.id)

    def evaluated(self, round_: int, samples: int, means: Mapping[str, float], number: int) -> None:
        """Write what all workers have measured together on `samples` samples. `number` tells evaluations apart."""
        context, values = self._context, {**means, "held_out": float(samples)}
        self._accuracy = measured(values, round_) or self._accuracy
        for name, value in values.items():
            context.log.metric(round_, "all workers", name, value, context.mail.stamp.incarnation, number)

    def write(self) -> None:
        """Write summary.json. Raises ClusterError if it cannot be written."""
        run_dir = self._context.run_dir
        try:
            failpoint("ending", self._context.ledger.committed)
            write_summary(run_dir, self.made())
        except OSError as error:
            raise ClusterError(f"the results could not be written to {run_dir}: {error.strerror or error}.") from None

    def made(self) -> dict[str, Any]:
        """Return the summary of the run so far."""
        context, totals = self._context, self._context.ledger.totals
        began, ended = self._planning.training_since, context.committed_at
        seconds = ended - began if began is not None and ended is not None else 0.0
        summary: dict[str, Any] = {
            "run": context.run,
            "policy": context.settings.policy,
            "workers": context.settings.workers,
            "servers": context.settings.servers,
            "samples": totals.samples,
            "seconds": round(seconds, 3),
            "samples_per_second": round((totals.samples - self._samples_before) / seconds, 1) if seconds else None,
            **results(context.ledger, context.policy, self._accuracy),
            "weights_sha256": self._model.weights_sha256,
            "micro_batches_committed": totals.micro_batches_committed,
            "micro_batches_recomputed": totals.micro_batches_recomputed,
            "duplicates_ignored": totals.duplicates_ignored,
            "dropped": totals.dropped,
            "samples_dropped": totals.samples_dropped,
            "wire": self._wire(),
            "refused": dict(sorted(self._status.rejected().items())),
        }
        workers = context.membership.workers.values()
        early = {w.name: w.ended_at for w in workers if w.early and w.ended_at >= 0 and not w.failed}
        exceptions: dict[str, Any] = {
            "left_early": early,
            "failed_after_the_last_round": {worker.name: worker.failed for worker in workers if worker.failed},
            "samples_before_resume": self._samples_before,  # `seconds` does not cover these
            "dropped_in_part": totals.dropped_in_part,
            "workers_failed": self._departures.failed,
            "saved": {name: msgspec.structs.asdict(saved) for name, saved in context.ledger.saved.items()},
            "staleness": {str(k): n for k, n in sorted(totals.staleness.items())},
        }
        if (end := context.ledger.run_end) is not None and end.updates >= 0:
            exceptions["ended_early"] = {"worker": end.worker, "reason": end.reason, "round": context.ledger.end}
        return summary | {key: value for key, value in exceptions.items() if value}

    def _wire(self) -> dict[str, float]:
        """Return the sums of all members' traffic: bytes of workers' frames, and seconds in codecs of workers and servers."""
        told = [msgspec.structs.asdict(member.heartbeat.traffic) for member in self._context.membership.members.values()]
        return {key: round(sum(traffic[key] for traffic in told), 3) for key in Traffic.__struct_fields__}
