"""A worker's part in a run. `Run` is the interface to it for scripts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import msgspec
import torch

from roundtable.common.config.batch_plan import derive_seed
from roundtable.common.policies import load
from roundtable.common.protocol.effects import COORDINATOR, number_of
from roundtable.common.protocol.messages.session import AskPast, EndRun, Goodbye, Heartbeat, KeepState, Past
from roundtable.common.protocol.messages.setup import Request
from roundtable.common.runtime.errors import Stopped, UsageError
from roundtable.common.runtime.failpoints import arm
from roundtable.common.runtime.watchdog import Watchdog
from roundtable.worker.client.context import WorkerContext, is_accepted
from roundtable.worker.client.io_thread import IoThread
from roundtable.worker.client.kv_client import KvClient
from roundtable.worker.data.loader import Loader, seed_everything
from roundtable.worker.loop.departure import Departure
from roundtable.worker.loop.gradient_loop import GradientLoop
from roundtable.worker.loop.local_sgd import LocalSgdLoop, MergeHooks
from roundtable.worker.loop.task_queue import TaskQueue
from roundtable.worker.optim.optimizer import silence_scheduler_warnings
from roundtable.worker.reports import ReportQueue
from roundtable.worker.router import MessageRouter
from roundtable.worker.session.assembly import Assembly
from roundtable.worker.session.ending import Ending
from roundtable.worker.session.final_tensors import FinalTensors
from roundtable.worker.session.segments import Segments
from roundtable.worker.session.training import Training
from roundtable.worker.together.collectives import Collectives
from roundtable.worker.together.epoch_metrics import EpochMetrics
from roundtable.worker.together.script_state import ScriptState


class Session:
    """Connects the parts of a worker: its messages, its training, and its end."""

    def __init__(self, io: IoThread) -> None:
        """Start to take part in the run that `io` joins."""
        self.io = io
        welcome = io.joined()
        self.servers = len(welcome.servers)
        index = number_of(welcome.process)
        self.context = WorkerContext(welcome.process, index, welcome.settings, load(welcome.settings), io)
        self.departure = Departure()
        self.departure.run_ends(welcome.ends_after)
        self.reports = ReportQueue(io)
        self.merge_hooks = MergeHooks([], self.open_kv, self.log)
        self.tasks = TaskQueue(welcome.process, welcome.share_tables)
        self.router = MessageRouter(io, self.tasks, self.reports, self._hear)
        self.ending = Ending(self.context, self.router, self.reports)
        self.metrics = EpochMetrics(self.context, lambda: self.work.epoch if self.work is not None else 0)
        self.assembly = Assembly(
            self.context, self.router, self.tasks, self.departure, self.merge_hooks, self.metrics, self.servers,
            rounds=(lambda: self.round, lambda: self._computed),
        )  # fmt: skip
        self.segments = Segments(self.context, self.tasks, self.departure, self.servers, lambda: self.work)
        self.collectives = Collectives(self.context, self.router, self.tasks, self.segments)
        #: None before the script has made its optimizer.
        self.training: Training | None = None
        self.final_tensors = FinalTensors()
        #: None before the script has asked for the key-value client.
        self.kv: KvClient | None = None
        #: The part of the run that lies behind the script.
        self._past = Past(0)
        #: How often this worker has sent the script's state.
        self._states = 0
        #: The script's own state. It is that of a new run before the script has made its optimizer.
        self.state = ScriptState(b"", self._keep_state)
        #: Whether the script was interrupted.
        self.interrupted = False
        #: Why the script failed; '' if it did not.
        self.failure = ""
        #: Whether the script failed because a server did not answer.
        self.cut_off = False
        #: Called when this worker has left the run.
        self.after_end: Callable[[], None] = lambda: None
        self._finished = False
        self._pid = os.getpid()
        arm(welcome.process, Path(welcome.run_dir))
        with io.lock:
            io.epoch = welcome.share_tables[-1].epoch
            io.on_message = self.router.handle
            io.on_replaced = self.router.replaced
            io.on_tick = self.router.tick
            io.heartbeat = self.heartbeat
        torch.set_num_threads(welcome.settings.threads)
        seed = derive_seed(welcome.settings.seed, "model")
        torch.manual_seed(seed)  # also GPUs that are not in use yet
        seed_everything(seed)
        silence_scheduler_warnings()
        self._watchdog = Watchdog(welcome.settings.stack_dump_after, self._progress, lambda: io.waits_for or "its own script")

    @property
    def work(self) -> GradientLoop | LocalSgdLoop | None:
        """The loop of the training; None before the script has made its optimizer."""
        return self.training.work if self.training is not None else None

    @property
    def round(self) -> int:
        """The round of the model's weights. They include all earlier rounds."""
        return self.work.round if self.work is not None else 0

    @property
    def _computed(self) -> int:
        """The round of the micro-batch that is computed now, or `round` if there is none."""
        task = self.work.batch.task if self.work is not None else None
        return task.round if task is not None else self.round

    def log(self, numbers: dict[str, float]) -> None:
        """Report metrics: with the current micro-batch, or by themselves if there is none."""
        if self.work is None or not self.work.batch.log(numbers):
            self.reports.metrics(self.round, numbers)

    def open_kv(self) -> KvClient:
        """Return the key-value client. Raises UsageError with --replicas, because the key-value store has no backups."""
        settings = self.context.settings
        if settings.replicas:
            raise UsageError("the key-value store has no copies on other servers: leave out --replicas.")
        if self.kv is None:
            self.kv = KvClient(self.io, self.servers, settings.progress_timeout)
        return self.kv

    def end_run(self, reason: str) -> None:
        """Ask for the run's end, and wait until it is known; see `Run.stop`."""
        work = self.work
        if work is None or self.segments.none:
            raise UsageError(
                "run.stop() ends a training, and none has begun: call it in the loop over run.batches(), or after it."
            )
        if self.departure.ends_after is None:
            request = EndRun(work.updates_at_least, reason)
            answer = self.context.request(COORDINATOR, request, lambda b: isinstance(b, Heartbeat) and b.ends_after >= 0)
            assert isinstance(answer, Heartbeat)
            self.departure.run_ends(answer.ends_after)

    # ---- going on

    def look_back(self) -> None:
        """Ask what lies behind the script, if the run has rounds that this worker has not seen."""
        if self.round:
            answer = self.context.request(
                COORDINATOR, AskPast(self.round), lambda b: isinstance(b, Past) and b.round == self.round
            )
            assert isinstance(answer, Past)
            self._past = answer
            self.state = ScriptState(answer.state, self._keep_state)

    def skip_loops(self) -> int:
        """Count the loops over batches that lie behind the script as begun. Return the number of loops that have begun."""
        training = self.training
        if self.segments.none and training is not None and self._past.segments:
            training.begin()
            for segment in self._past.segments:
                self.segments.adopt(segment)
                if list(training.work.batches(segment, cast(Loader, None))):
                    raise AssertionError(f"segment {segment.index} is not done")
        return self.segments.begun

    def _keep_state(self, value: bytes) -> None:
        if self.tasks.is_chief:
            self._states += 1
            kept = KeepState(self._states, self.round, value)
            self.context.request(COORDINATOR, kept, is_accepted(Request.STATE, self._states))

    # ---- signs of life

    def heartbeat(self) -> Heartbeat:
        """Return what this worker is doing."""
        traffic = self.router.traffic
        if self._finished:
            unsteady = self.work.heartbeat().unsteady if self.work is not None else ""
            return Heartbeat("done", self.round, traffic=traffic, unsteady=unsteady)
        if self.work is not None:
            return msgspec.structs.replace(self.work.heartbeat(), traffic=traffic)
        return Heartbeat("starting") if self.kv is None else Heartbeat("computing", progress=self.kv.answered)

    def _progress(self) -> tuple[int, int, int] | None:
        """Return numbers that change while this worker makes progress. The watchdog's thread calls this."""
        with self.io.lock:
            heartbeat = self.heartbeat()
        return (
            (heartbeat.round, heartbeat.micro_batch + heartbeat.progress, self.io.answers) if heartbeat.state != "done" else None
        )

    # ---- the end

    @property
    def is_under_way(self) -> bool:
        """Whether rounds of a loop over batches are left to do."""
        return not self.segments.done

    @property
    def has_trained(self) -> bool:
        """Whether there has been a loop over batches."""
        return not self.segments.none

    @property
    def left_early(self) -> bool:
        """Whether this worker has stopped training before the run's end, because it was asked to leave."""
        return self.departure.early

    @property
    def stop_signal(self) -> int:
        """The signal that has asked this worker to stop; 0 if none has."""
        return self.io.stop_signal

    @property
    def failed_elsewhere(self) -> bool:
        """Whether the coordinator has said that the run has failed."""
        return self.io.failed

    def leave(self) -> None:
        """Leave after the current micro-batch; see `Run.leave`."""
        self.departure.requested = not self.context.policy.is_local

    def on_stop_signal(self, number: int, frame: object = None) -> None:
        """Handle a signal: leave once the coordinator allows it, because other workers do the rest or there is a checkpoint.

        Raises Stopped if it is called again.
        """
        if os.getpid() != self._pid:  # this process is a child that the script has forked
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif self.io.stop_signal and not self._finished:
            raise Stopped(number)
        elif not self.io.stop_signal:
            self.io.stop_signal, self.io.stop_signal_at = number, time.monotonic()

    def _hear(self, heartbeat: Heartbeat) -> None:
        """Take what the coordinator says of this worker's end and of the run's."""
        self.departure.run_ends(heartbeat.ends_after)
        if heartbeat.leaves:
            self._may_leave()

    def _may_leave(self) -> None:
        """Leave after a stop signal, because the coordinator has released this worker.

        Inside a loop over batches, the worker leaves between two micro-batches and pushes what it has. Elsewhere there is
        nothing to push, so the script is interrupted.
        """
        self.departure.requested = True
        if self.segments.done:
            self.io.interrupt()

    def finish(self) -> None:
        """Leave the run; see `Run.finish`."""
        self.leave_cluster()
        self.after_end()

    def leave_cluster(self) -> None:
        """Do the part of `finish` that other processes see."""
        if self._finished:
            return
        self._finished = self.io.copies = True
        self.segments.close()
        try:
            if self.failure or self.interrupted:
                used_kv = self.kv is not None
                self.ending.give_up(
                    Goodbye(self.failure, self.interrupted, cut_off=self.cut_off, used_kv=used_kv, round=self.round)
                )
                return
            if self.training is not None and self.training.setup.begins_later:
                self.training.begin()
            self.ending.await_reports()
            changed = self.final_tensors.changed()
            self.ending.take_leave(
                self.heartbeat,
                lambda: Goodbye(early=self.departure.early or self.io.stop_signal > 0, round=self.round, changed=changed),
            )
        finally:
            self._watchdog.stop()
            self.io.close()
            self.release_model()

    def release_model(self) -> None:
        """Make the model an ordinary one. After a failed run, the weights that it still waits for never come."""
        if self.work is not None:
            self.work.close()
