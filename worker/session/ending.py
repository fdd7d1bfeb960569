"""The end of a worker's part in a run."""

from __future__ import annotations

from collections.abc import Callable

from roundtable.common.protocol.effects import COORDINATOR, Send
from roundtable.common.protocol.messages.session import Goodbye, Heartbeat
from roundtable.common.protocol.messages.setup import Request
from roundtable.worker.client.context import WorkerContext
from roundtable.worker.reports import ReportQueue
from roundtable.worker.router import MessageRouter

#: Seconds that a worker waits at most, before it leaves, for servers to acknowledge what it has sent.
_HAND_OVER_S = 10.0
#: The thing that a worker waits for once its script has ended, in words.
_END = "the coordinator to end the run, which others may still compute"


class Ending:
    """Waits until other processes have all results of this worker, and says goodbye to the coordinator."""

    def __init__(self, context: WorkerContext, router: MessageRouter, reports: ReportQueue) -> None:
        self._context, self._router, self._reports = context, router, reports

    def give_up(self, goodbye: Goodbye) -> None:
        """Tell the coordinator that the script has failed or was interrupted."""
        io = self._context.io
        io.send(Send(COORDINATOR, goodbye))
        io.wait(lambda: io.stopped, 2.0, lambda: "", every=1.0)

    def await_reports(self) -> None:
        """Wait until the coordinator has all reports, and for a limited time until the servers have all pushes."""
        wait, reports = self._context.wait, self._reports
        wait(lambda: reports.has_all(Request.METRICS), lambda: f"the coordinator to record {reports.metrics_text()}")
        self.await_recomputed()
        wait(lambda: self._router.idle, lambda: "the servers to acknowledge all pushes", every=_HAND_OVER_S)

    def await_recomputed(self) -> None:
        """Wait until the model's file has the tensors that this worker has computed again."""
        statistics = "the coordinator to write the statistics that were computed again"
        self._context.wait(lambda: self._reports.has_all(Request.RECOMPUTED), lambda: statistics)

    def take_leave(self, heartbeat: Callable[[], Heartbeat], goodbye: Callable[[], Goodbye]) -> None:
        """Tell the coordinator that the script has ended, again and again until the coordinator ends the run."""
        io = self._context.io
        while not io.stopped:
            io.send(Send(COORDINATOR, heartbeat()), Send(COORDINATOR, goodbye()))  # the heartbeat first: it reports the last work
            io.wait(lambda: io.stopped, float("inf"), lambda: _END, every=1.0)
