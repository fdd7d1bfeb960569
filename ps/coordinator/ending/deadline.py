"""Gives a run up if nothing has moved for too long, or if no worker is left."""

from __future__ import annotations

from roundtable.common.runtime.errors import ClusterError
from roundtable.common.storage.event_log import some
from roundtable.ps.coordinator.context import RunContext
from roundtable.ps.coordinator.parts.checkpoints import CheckpointDriver
from roundtable.ps.coordinator.parts.departures import Departures
from roundtable.ps.coordinator.parts.model import ModelCollector
from roundtable.ps.coordinator.parts.status import StatusReporter


class Deadline:
    """Fails a run that cannot go on, and says why."""

    def __init__(
        self,
        context: RunContext,
        model: ModelCollector,
        departures: Departures,
        checkpoints: CheckpointDriver,
        status: StatusReporter,
    ) -> None:
        self._context = context
        self._model = model
        self._departures = departures
        self._checkpoints = checkpoints
        self._status = status

    def tick(self, now: float) -> None:
        """Raise ClusterError if the run cannot go on."""
        context, model = self._context, self._model
        if not context.membership.started:
            return
        if self._departures.all_have_left(now):
            self._fail_without_workers()
            return
        self._fail_between_loops()
        behind = self._departures.behind_the_end()
        if model.is_complete and not behind:
            context.progressed_at = now  # scripts may go on after the last round for as long as they like
            return
        idle_s, patience_s = now - context.progressed_at, context.settings.progress_timeout
        if idle_s <= patience_s or (not self._has_begun and idle_s <= context.settings.start_timeout):
            return
        if not behind:
            raise ClusterError(
                f"no progress for {patience_s:.0f} s (--progress-timeout): round {context.ledger.committed} waits for "
                f"{self._waits_for()}"
                f"{self._missing()}."
            )
        for worker in behind:
            self._departures.give_up(worker, f"it has not received the last weights within {patience_s:.0f} s.", now, {})

    def _fail_without_workers(self) -> None:
        ledger = self._context.ledger
        if self._checkpoints.scheduler.in_progress is None:
            raise ClusterError(
                f"all scripts left the training loop after {ledger.committed} of {ledger.planned} rounds: let run.batches() "
                "finish, set --rounds, or call run.stop(reason) to end a run early."
            )

    def _fail_between_loops(self) -> None:
        """Raise ClusterError if no worker is left, more rounds may follow, and a script has failed."""
        membership = self._context.membership
        nobody = not membership.names("worker") and not membership.awaits_workers
        if nobody and self._context.may_go_on and (failed := [w for w in membership.workers.values() if w.left and w.failed]):
            raise ClusterError(f"{failed[0].name} failed between two loops over run.batches(): {failed[0].failed}")

    @property
    def _has_begun(self) -> bool:
        """Return whether any worker trains, or would train if it reached all servers.

        Before that, the first worker may be busy outside of the run, such as with loading data.
        """
        members = self._context.membership.members.values()
        return bool(self._context.ledger.planned) or any(
            member.heartbeat.round > 0 or member.heartbeat.unreached for member in members
        )

    def _waits_for(self) -> str:
        membership = self._context.membership
        if self._context.journal.unwritten_since is not None:
            return "the disk, because the event log cannot be written"
        if self._model.collecting is not None:
            missing = [f"server-{number}" for number in self._model.collecting.missing]
            return (
                f"{some(missing)}, for a part of the trained model"
                if missing
                else "the disk, because the model cannot be written"
            )
        if membership.awaits_workers:
            return f"a worker to join, because {some(list(membership.workers))} are gone"
        return self._status.whom_all_wait_for() or "every process"

    def _missing(self) -> str:
        """Return a text on the micro-batches that each server lacks of its open round, by its last heartbeat."""
        lacking = [(server.name, server.heartbeat) for server in self._context.scheduler.servers if server.heartbeat.missing]
        return "".join(
            f"; {name} is missing micro-batch{'es' * (len(last.missing) > 1)} {some([*map(str, last.missing)])} "
            f"of round {last.round}"
            for name, last in lacking
        )
