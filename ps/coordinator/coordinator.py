"""The coordinator process: a loop that moves messages between its socket and its state machines. It needs no torch."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import zmq

from roundtable.common.config.settings import Settings
from roundtable.common.network.host_identity import here
from roundtable.common.policies import load
from roundtable.common.protocol.envelope import Envelope
from roundtable.common.protocol.flow_limits import Inflow, Standing
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.commit import AllNorms, CloseRound, Mean, Metrics, Norms, Report, RoundReady
from roundtable.common.protocol.messages.saving import CheckpointStatus, ModelPart, Recomputed
from roundtable.common.protocol.messages.session import (
    Goodbye,
    Heartbeat,
    Hello,
    MembershipUpdate,
    MembersLost,
    Reassign,
    Refused,
    RequestWork,
    Stop,
    Traffic,
    Welcome,
)
from roundtable.common.protocol.messages.setup import Accepted, Plan, PlanReply, Request, Setup, SetupReply
from roundtable.common.protocol.rejections import Rejections
from roundtable.common.protocol.tickets import KEY_BYTES, seal
from roundtable.common.protocol.transport import (
    ASK_AGAIN_S,
    BEAT_S,
    ForeignRun,
    Frames,
    Stamp,
    bytes_of,
    is_address,
    new_incarnation,
    receive,
    send,
)
from roundtable.common.runtime.errors import ClusterError, PsError, RunStopped, Stopped, WireError, printable
from roundtable.common.runtime.failpoints import arm, failpoint
from roundtable.common.runtime.versions import versions_here
from roundtable.common.runtime.watchdog import Watchdog
from roundtable.common.storage import disk_alarm
from roundtable.common.storage.checkpoint import (
    TOKEN_FILE,
    FileEntry,
    Manifest,
    file_of,
    finished,
    folder_of,
    folders,
    remove,
    round_of,
    write_manifest,
)
from roundtable.common.storage.event_log import Event, StatusRow, some
from roundtable.common.storage.run_files import MODEL_FILE
from roundtable.ps.coordinator.checkpoint_scheduler import CheckpointInProgress, CheckpointScheduler
from roundtable.ps.coordinator.group_commit import ALARM_S, GroupCommit
from roundtable.ps.coordinator.recovery import RestoredRun, RunHeader, new_run
from roundtable.ps.coordinator.results import ModelFile, rules_in, summarized_run, write_summary
from roundtable.ps.coordinator.state.ledger import Ledger
from roundtable.ps.coordinator.state.membership import NEAR_S, Member, Membership, number_of
from roundtable.ps.coordinator.state.model_collection import ModelCollection
from roundtable.ps.coordinator.state.scheduler import Scheduler
from roundtable.ps.coordinator.summary_metrics import Measured, measured, results
from roundtable.ps.model_parts import sizes
from roundtable.ps.token_bucket import Allowance

log = logging.getLogger("roundtable.ps.coordinator")

TICK_MS = 50
#: Seconds between two writings of the status of all processes, with the books.
_STATUS_S = 0.25
#: Seconds between two lines on progress in its own log, for those who have no other screen.
_TELL_S = 10.0
#: Seconds in which the others are told that the run is over, before the coordinator leaves.
_FAREWELL_S = 1.0
#: So many where it begins anew: whoever has not heard is told by the one that comes after.
_FAREWELL_ANEW_S = 0.1
#: Seconds for all workers to join a run that goes on; it starts without those that do not.
_FEWER_S = 15.0
#: Seconds for the servers' last reports to come in after all workers have left.
_LEFT_S = 3.0
#: Seconds after the last round in which those who go on with another loop say so: then its model is taken for the trained one.
_SETTLED_S = 0.3
#: Seconds for the others to connect to a coordinator that was started again.
_REJOIN_S = 5.0
#: Seconds that the others may need at least to find it, for which their silence is not counted.
_FIND_S = 4.0

#: Bytes of metrics that a worker may log a second, and at once; and of a row of them besides the name.
_METRICS_BYTES_S, _METRICS_BYTES = 100e3, 4e6
_ROW_BYTES = 100
#: What is told of a worker whose first micro-batch had two gradients.
_UNSTEADY = (
    "{who} has computed its first micro-batch twice, from the same weights, samples and seed, and the gradient of '{name}' "
    "differs: the script carries something from batch to batch (a hidden state, a counter, a generator of its own), or its "
    "arithmetic is not deterministic. So the result depends on who computes what. Have such state in a buffer of the model."
)
#: What servers and workers may send once they have joined.
_FROM: dict[str, tuple[type[Body], ...]] = {
    "server": (Heartbeat, Report, RoundReady, Norms, CloseRound, AllNorms, CheckpointStatus, ModelPart),
    "worker": (Heartbeat, Setup, Plan, RequestWork, Mean, Metrics, Recomputed, Goodbye),
}


class BeginAnew(Exception):
    """The run is to go on from its newest snapshot, with processes that begin anew, this one too."""


class Coordinator:
    """One run's coordinator. `run` is the loop; everything else handles one kind of message."""

    def __init__(
        self,
        sock: zmq.Socket[bytes],
        settings: Settings,
        run_dir: Path,
        books: RestoredRun | None = None,
        recovers: bool = False,
        late_s: float | None = None,
    ) -> None:
        """With `books` it goes on with the run whose they are: with processes that begin anew, or if it `recovers`, in place of
        the coordinator that has kept them. With `late_s` that run is over, and as many as it had may ask for so long."""
        now = time.monotonic()
        self._sock = sock
        self._settings = settings
        self._run_dir = run_dir
        self._head = RunHeader(
            run=new_run() if books is None else books.head.run,
            incarnation=new_incarnation() if books is None else books.head.incarnation + 1,
            host=platform.node(),
            settings=settings,
            resume=-1 if books is None else books.head.resume,
            key=books.head.key if books is not None and recovers else secrets.token_bytes(KEY_BYTES),
        )
        run = self._head.run
        self._run = run.partition(".")[0]
        self._stamp = Stamp(sender="coordinator", run=run, incarnation=self._head.incarnation)
        policy = load(settings)
        self._policy = policy
        self._membership = Membership(
            settings, policy, run, now, str(run_dir.resolve()), self._head.resume, here(), self._head.key
        )
        if books is not None and not policy.is_local:
            self._membership.fewer_after_s = _FEWER_S  # by now there may be fewer on purpose
        self._cuts = CheckpointScheduler(settings.checkpoint_every, now)
        self._ledger = Ledger(settings, policy)
        if books is not None:
            self._ledger = books.ledger
            if not books.tables:  # who takes part says what the model and the plan are
                self._ledger.go_on(settings)
        #: Samples of a run that goes on which were not trained on under this coordinator.
        self._samples_before = self._ledger.totals.samples
        self._leasing = Scheduler(policy, self._ledger, self._membership)
        #: The trained model, and how it is got from the servers, once all rounds that are known of are done: since when they are.
        self._model: ModelFile | None = None
        self._collecting: ModelCollection | None = None
        self._trained_since: float | None = None
        #: Whether there is something to hash, and the number of the last `Recomputed` that is in the file.
        self._hashes = False
        self._revised = -1
        self.journal = GroupCommit(run_dir, self._head, self._membership, self._ledger, now)
        self._log = self.journal.log
        #: Of what has been loaded here, whatever is installed meanwhile.
        self._versions = versions_here()
        arm("coordinator", run_dir)
        self._routes: dict[str, bytes] = {}
        #: Ids of processes that this one could see: not those of other containers, even of this host.
        self._seen: set[int] = set()
        #: When each process's beat was last answered.
        self._answered_at: dict[str, float] = {}
        #: Workers whose model or data are not the others'.
        self._unlike: set[str] = set()
        #: Sentences on workers whose script has failed and that the run goes on without; how many `worker_failures` has admitted.
        self._failed = [] if books is None else books.failed
        self._admitted = 0 if books is None else books.admitted
        #: By incarnation of the worker and number.
        self._seen_metrics: set[tuple[int, int]] = set()
        #: What each worker may have written down of them.
        self._metrics_bytes = Allowance(_METRICS_BYTES_S, _METRICS_BYTES)
        self._refusals = Rejections(log)
        #: Watches connections, once the loop runs.
        self._inflow: Inflow | None = None
        self._told_refused: Counter[str] = Counter()
        #: When it was last told that somebody may not join.
        self._refused_at = float("-inf")
        #: Incarnations of workers and of servers that those cannot reach, as was told.
        self._told_unreached: set[tuple[int, int]] = set()
        #: Kinds of arithmetic that were told of, as they are not the first worker's.
        self._arithmetic_told: set[tuple[tuple[str, str], ...]] = set()
        #: When it was last told that there is no snapshot.
        self._failure_told_at = float("-inf")
        self._accuracy: Measured | None = None
        self._status_at = self._told_at = now
        self._progressed_at = now
        self._planned = 0
        self._training_since: float | None = None
        self._committed_at: float | None = None
        #: Of one that goes on: when it began, the newest round on which a coordinator before it can have decided, once that is
        #: known, and how the run has ended, if it has.
        self._recovered_at: float | None = None
        self._inherits_to: int | None = None
        self._stop: Stop | None = None
        #: The signal that has told it to stop, if any, and whether it is at it.
        self._signal = 0
        self._is_stopping = False
        #: Until when a snapshot may take that is made because somebody is to stop.
        self._stops_until: float | None = None
        #: Workers that were told to stop and may leave.
        self._dismissed: set[str] = set()
        #: Seconds for those who come too late, and who of them has heard, by incarnation.
        self._late_s = late_s
        self._late: set[int] = set()
        if books is not None and recovers:
            self._take_over(books, now)
        else:
            self._log.event(Event("started", "coordinator", {"run": run, "pid": os.getpid()}))
        disk_alarm.sound("")  # that of one before it
        self._flush()

    def _take_over(self, books: RestoredRun, now: float) -> None:
        committed = books.ledger.committed
        self._seen = {kept.hello.pid for kept in books.members.values()}
        self._membership.restore(
            [
                Member(
                    name,
                    kept.hello,
                    kept.incarnation,
                    now - NEAR_S if self._is_dead(kept.hello) and not kept.left else now + _FIND_S,
                    Heartbeat(round=committed),
                    left=kept.left,
                    lost=kept.lost,
                    early=kept.early,
                    replaces=kept.replaces,
                    ended_at=kept.ended_at,
                    failed=kept.failed,
                )
                for name, kept in books.members.items()
            ],
            books.tables,
        )
        self._seen_metrics, self._accuracy = books.metrics, books.accuracy
        self._planned, self._samples_before = self._ledger.planned, books.samples_before
        earlier = now - time.time()  # from unix seconds
        if books.planned_at is not None:
            self._training_since = books.planned_at + earlier
        if books.committed_at is not None:
            self._committed_at = books.committed_at + earlier
        if books.model is not None and books.model[1] == self._ledger.planned:
            self._model = self._new_model()
            self._model.restore(books.model[0])
        self._recovered_at = now
        self._stop = books.stop or (Stop(True) if summarized_run(self._run_dir) == self._run else None)
        log.info("goes on with run %s after %d rounds", self._run, committed)
        data = {"run": books.head.run, "pid": os.getpid(), "rounds": committed}
        self._log.event(Event("recovered", "coordinator", data))

    # ---- the loop

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._sock, zmq.POLLIN)
        if self._stop is not None:
            self._end_as_told(self._stop)
            return
        self._inflow = Inflow(self._sock, self._refusals)
        watchdog = Watchdog(self._settings.stack_dump_after, self._progress, self._whom_all_wait_for)
        try:
            ticked_at = time.monotonic()
            while True:
                poller.poll(0 if self._hashes else TICK_MS)
                self._drain()
                self._collect(time.monotonic())
                if (now := time.monotonic()) >= ticked_at + TICK_MS / 1000:
                    ticked_at = now
                    self._inflow.look(now)
                    self._tick(now)
                    if self._finished():
                        break
            self._write_results()
        except BeginAnew as error:
            self._have_all_begin_anew(str(error))
            raise
        except PsError as error:
            self._log.event(Event("failed", "coordinator", {"reason": str(error)}))
            self._farewell(Stop(False, str(error)))
            raise
        except Stopped as error:
            self._farewell(Stop(False, f"the run was told to stop: {error}.", on_request=True))
            raise
        finally:
            self._inflow.close()
            watchdog.stop()
        self._log.event(Event("finished", "coordinator", {}))
        self._farewell(Stop(True))

    def stop(self, number: int) -> None:
        """Have the run stop after the round in progress, with a snapshot, for the signal `number`; at once when called again with
        the same. (If all processes of a host are told to stop, a launcher among them tells it too, by another signal.)

        A signal's handler may call it.
        """
        if self._signal == number:
            raise Stopped(number, self._how_far())
        self._signal = self._signal or number

    def _stop_soon(self, now: float) -> None:
        """Raise Stopped once a snapshot is made, or cannot be."""
        if not self._is_stopping:
            self._is_stopping, self._stops_until = True, None
            log.warning("is told to stop: ends the round in progress and makes a snapshot; a second signal stops it at once")
            self._log.event(Event("stopping", "coordinator", {"seconds": self._settings.stop_timeout}))
        if self._is_saved(now):
            raise Stopped(self._signal, self._how_far())

    def _is_saved(self, now: float) -> bool:
        """Have a snapshot made of the end of the round in progress, because somebody is to stop then. Whether it is there, or
        will not be in time."""
        if self._stops_until is None:
            self._stops_until = now + self._settings.stop_timeout
            self._cuts.hurry(now)
        cuts, is_trained = self._cuts, self._membership.started and self._ledger.planned > 0
        is_made = cuts.is_made or (cuts.under is None and cuts.newest == self._ledger.committed)
        cannot = not is_trained or not self._settings.checkpoint_every or self._membership.broken or cuts.failure
        return bool(is_made or cannot or now > self._stops_until)

    def _let_leave(self, now: float) -> None:
        """Let those leave that were told to stop: a worker at once if others stay, who do what it has not done; all else after a
        snapshot, for the run may have to go on from that. If the run itself is to stop, all leave with it."""
        asking = [member for member in self._membership.members.values() if member.active and member.beat.leaves]
        asking = [member for member in asking if member.name not in self._dismissed]
        if self._signal or not asking:
            self._stops_until = self._stops_until if self._signal else None
            return
        spared = [member for member in asking if self._is_spared(member)]
        if len(spared) < len(asking) and self._is_saved(now):
            spared = asking
        for member in spared:
            log.info("%s was told to stop, and leaves", _called(member))
            self._progressed_at = now
            if member.hello.role == "worker" and not self._policy.is_local:
                self._dismissed.add(member.name)
                self._send(member.name, Heartbeat(leaves=True))
            else:
                self._tell_members(self._membership.dismiss(member.name))
                self._send(member.name, self._membership.fence(member))

    def _is_spared(self, member: Member) -> bool:
        """Whether the run goes on without a member that leaves as if it had never been there."""
        if member.hello.role == "server":
            return not self._needs_servers()
        stays = any(other.active and not other.beat.leaves for other in self._membership.workers.values())
        return self._is_over or (stays and not self._policy.is_local)

    def _how_far(self) -> str:
        """What there is to go on from, if the run stops now."""
        done, newest = self._ledger.committed, finished(self._run_dir)
        saved = f"with a snapshot of round {round_of(newest[-1])}" if newest else "without a snapshot"
        why = ""
        if not self._cuts.is_made and done:
            merges = f", which policy {self._settings.policy} makes at merges only" if self._policy.is_local else ""
            why = f", as none was made in time{merges}" if self._settings.checkpoint_every else ", as --checkpoint-every 0 says"
        return f"it has done {done} rounds, {saved}{why}"

    def _end_as_told(self, stop: Stop) -> None:
        """The one before has ended the run, and may have died before all have heard of it."""
        self._tell(stop)
        if stop.restart:
            raise BeginAnew(stop.reason)
        if not stop.ok:
            raise (RunStopped if stop.on_request else ClusterError)(stop.reason)

    def _have_all_begin_anew(self, reason: str) -> None:
        self._log.event(Event("restarted", "coordinator", {"reason": reason}))
        log.warning("all begin anew, from the newest snapshot: %s", reason)
        self._farewell(Stop(False, reason, restart=True))

    def _drain(self) -> None:
        until = time.monotonic() + BEAT_S
        while time.monotonic() < until:
            frames: list[zmq.Frame] | None = []
            standing = Standing.STRANGER
            try:
                frames = receive(self._sock)
                if frames is None:
                    break
                if len(frames) < 2:
                    raise WireError("a message has no header", "malformed")
                try:
                    envelope = self._stamp.open(frames[1].buffer, joining=True)
                except ForeignRun as error:
                    if error.run.partition(".")[0] == self._run:  # it has not heard that all begin anew
                        told = replace(self._stamp, run=error.run)
                        send(self._sock, told.encode(Stop(False, "the run has begun anew.", restart=True)), to=frames[0].bytes)
                    raise
                self._handle(frames[0].bytes, envelope, frames[2:])
                if envelope.run:
                    standing = Standing.MEMBER
                elif self._membership.knows(envelope.incarnation):
                    standing = Standing.JOINING
            except WireError as error:
                self._refusals.note(error, time.monotonic())
            if self._inflow is not None and frames:
                self._inflow.took(frames[1:], standing)
        if self.journal.is_urgent:
            self._flush()

    def _tick(self, now: float) -> None:
        self._tell_members(self._membership.tick(now, self._is_dead))
        self._let_leave(now)
        self._note_losses(now)
        if self._signal:
            self._stop_soon(now)
        if self._membership.broken and self._needs_servers():
            raise BeginAnew(self._membership.broken)
        self._write_rows(now)
        if now >= self._status_at + _STATUS_S:
            self._status_at = now
            if not self._awaits_members(now):
                for lease in self._leasing.deal(now):
                    self._give(lease)
            self._write_status()
            self._flush()
        elif self.journal.is_due(now):
            self._flush()
        if now >= self._told_at + _TELL_S:
            self._told_at = now
            self._tell_how_far(now)
        self._take_snapshots(now)
        self._collect(now)
        self._check_deadline(now)

    def _tell_how_far(self, now: float) -> None:
        """Say which round it is, or who is missing."""
        if missing := self._missing(now):
            log.info("waits for %s", missing)
            self._log.event(Event("waiting", "coordinator", {"for": missing}))
        if self._ledger.planned:
            log.info("round %d of %d, loss %s", self._ledger.committed, self._ledger.planned, self._loss())
        if (refused := self._refused()) != self._told_refused:
            self._told_refused = refused
            self._log.event(Event("refused", "coordinator", dict(refused)))

    def _missing(self, now: float) -> str:
        """Who has to do something before anything moves; '' while something moves."""
        if not self._membership.started:
            return self._membership.missing()
        if awaited := self._membership.awaited():
            return awaited
        if self._has_model and (there := self._membership.names("worker")):
            return f"the script of {some(there)}, which goes on after the last round"
        if now < self._progressed_at + _TELL_S or not (names := self._whom_all_wait_for()):
            return ""
        return f"{names}; nothing has moved for {now - self._progressed_at:.0f} s"

    def _note_losses(self, now: float) -> None:
        """Tell of those who were lost. Whoever has started one that hangs reads it in the event log, and may end it."""
        forgotten = {member.name for member in self._membership.newly_forgotten}
        for name, why, pid in self._membership.newly_lost:
            if name in forgotten:
                self._log.event(Event("forgotten", name, {"why": why}))
                continue
            then = "others do what it has not done" if name in self._membership.workers else "another is to take its place"
            if self._is_over and name in self._membership.workers:
                self._membership.workers[name].failed, then = why, "all rounds are done, and nobody needs it"
            log.warning("%s is lost: %s; %s", name, why, then)
            self._log.event(Event("lost", name, {"why": why, "pid": pid}))
            self._progressed_at = now
        self._membership.newly_lost.clear()
        if forgotten:
            self._forget()

    def _forget(self) -> None:
        """Keep nothing but the names of workers that have joined and never took part."""
        gone = self._membership.newly_forgotten
        log.warning("%s said hello, and nothing else has come from there", some([member.name for member in gone]))
        for member in gone:
            self._routes.pop(member.name, None)
            self.journal.forget(member)
            self._log.status(StatusRow(member.name, "lost", -1, ""))
        gone.clear()

    def _is_dead(self, hello: Hello) -> bool:
        """Whether it is certain that a process has ended: its id means the same here, and could be seen."""
        return hello.place.sees(here()) and hello.pid in self._seen and not Path(f"/proc/{hello.pid}").exists()

    # ---- snapshots

    def _take_snapshots(self, now: float) -> None:
        """Begin a snapshot that is due, ask for what is missing of the one under way, and finish it."""
        if self._ledger.layout is None or not self._membership.started or self._membership.lost_servers:
            return
        servers = {
            owner: max(0, self._membership.servers[f"server-{owner}"].beat.round) for owner in self._ledger.layout.owners()
        }
        done = self._ledger.committed >= self._ledger.planned
        ended = not self._membership.names("worker") and (done or self._stops_until is not None)
        if self._all_have_left(now) and self._ledger.committed > 0:
            ended = True
            if self._cuts.under is not None and self._cuts.under.round > max(servers.values()):
                remove(folder_of(self._run_dir, self._cuts.give_up()))
        round_ = self._cuts.due(servers, self._ledger.planned, ended, now)
        if round_ is not None:
            self._begin_snapshot(round_, now, ended)
        for server, cut in self._cuts.ask(servers, now):
            self._send(f"server-{server}", cut)
            failpoint("cutting", cut.round)
        outcome = self._cuts.outcome(servers, now)
        under = self._cuts.under
        if not outcome or under is None or (outcome == "complete" and self._ledger.committed < under.round):
            return  # what is in a snapshot is in the books
        if outcome == "complete":
            outcome = self._finish_snapshot(under)
        if outcome:
            remove(folder_of(self._run_dir, under.round))
        self._cuts.end(outcome, now)
        if self._cuts.failure:
            self._tell_of_failure(outcome)

    def _begin_snapshot(self, round_: int, now: float, final: bool) -> None:
        folder, token = folder_of(self._run_dir, round_), secrets.token_hex(8)
        self._cuts.begin(round_, token, now, final)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TOKEN_FILE).write_text(token, encoding="utf-8")
        except OSError as error:
            remove(folder)
            self._cuts.end(f"{folder} cannot be written: {error.strerror or error}.", now)
            self._tell_of_failure(self._cuts.failure)

    def _finish_snapshot(self, under: CheckpointInProgress) -> str:
        """Write the manifest, when the books up to there are on the disk, and remove what is too old; why not, if that failed."""
        assert self._ledger.setup is not None
        files = {file_of(server): FileEntry(said.sha256, said.bytes) for server, said in under.said.items()}
        manifest = Manifest(
            run=self._run, round=under.round, servers=self._settings.servers, setup=self._ledger.setup,
            settings=msgspec.structs.asdict(self._settings), files=files, versions=self._versions,
        )  # fmt: skip
        try:
            self._enter(time.monotonic())
            self._log.flush()
            failpoint("completing", under.round)
            write_manifest(folder_of(self._run_dir, under.round), manifest)
        except Exception as error:  # a snapshot less must not end the run
            return f"the snapshot of round {under.round} could not be finished: {error}."
        for old in folders(self._run_dir)[: -self._settings.keep_checkpoints]:
            remove(old)
        self._failure_told_at = float("-inf")
        size = sum(entry.bytes for entry in files.values())
        self._log.event(Event("snapshot", "coordinator", {"round": under.round, "bytes": size}))
        log.info("snapshot of round %d: %.1f MB", under.round, size / 1e6)
        return ""

    def _tell_of_failure(self, reason: str) -> None:
        """Once in a while, for the next try may fail for the same reason soon."""
        now = time.monotonic()
        if now < self._failure_told_at + ALARM_S:
            return
        self._failure_told_at = now
        self.journal.warn(f"no snapshot: {reason}")

    def _loss(self) -> str:
        loss = self._ledger.recent("loss")
        return "not logged" if loss is None else f"{loss.value:.4f}"

    def _write_rows(self, now: float) -> None:
        if self.journal.enter_rows():
            self._progressed_at = self._committed_at = now

    def _enter(self, now: float) -> None:
        """Hand the log all that is new in the books; its next flush puts it on the disk."""
        self._write_rows(now)
        self.journal.enter_state()

    def _flush(self) -> None:
        """Have the books on the disk, and keep what was promised for then."""
        now = time.monotonic()
        self._enter(now)
        for route, body in self.journal.flush(now):
            self._reply(route, body)

    def _check_deadline(self, now: float) -> None:
        """Give up where nothing has moved for the whole time-out, or nobody is left to move anything."""
        idle_s, rounds = now - self._progressed_at, self._ledger
        if not self._membership.started:
            return
        nobody = not self._membership.names("worker") and not self._membership.awaits_workers
        if self._all_have_left(now):
            if self._cuts.under is None:
                raise ClusterError(
                    f"all workers have left after {rounds.committed} of {rounds.planned} rounds: "
                    "a script must go on until run.batches() ends; --rounds sets where that is."
                )
            return
        if nobody and self._may_go_on and (failed := [m for m in self._membership.workers.values() if m.left and m.failed]):
            raise ClusterError(f"{failed[0].name} failed between two loops over run.batches(): {failed[0].failed}")
        if self._has_model and not self._behind_the_end():
            self._progressed_at = now  # whoever is there is at something of its own, which may take as long as it likes
            return
        if idle_s <= self._settings.progress_timeout or (not self._has_begun and idle_s <= self._settings.start_timeout):
            return
        if behind := self._behind_the_end():
            for worker in behind:
                self._give_up(worker, f"it has not got the last weights for {self._settings.progress_timeout:.0f} s.", now, {})
            return
        waiting = self._whom_all_wait_for() or "every process"
        if self.journal.unwritten_since is not None:
            waiting = "the disk, for the event log cannot be written"
        elif self._collecting is not None:
            missing = [f"server-{number}" for number in self._collecting.missing]
            waiting = (
                f"{some(missing)}, for a part of the trained model" if missing else "the disk, for the model cannot be written"
            )
        elif self._membership.awaits_workers:
            waiting = f"a worker to join, for {some(list(self._membership.workers))} are gone"
        raise ClusterError(
            f"nothing has moved for {self._settings.progress_timeout:.0f} s: round {self._ledger.committed} waits for {waiting}"
            f"{self._missing_text()}."
        )

    @property
    def _has_begun(self) -> bool:
        """Whether somebody trains, or would if it reached all servers. Before that the first worker may be at something of its
        own, such as loading data."""
        members = self._membership.members.values()
        return bool(self._ledger.planned) or any(member.beat.round > 0 or member.beat.unreached for member in members)

    def _all_have_left(self, now: float) -> bool:
        """Whether all scripts have ended before the last round, and what they have handed in is applied."""
        if now <= self._progressed_at + _LEFT_S or not self._membership.started or self._membership.names("worker"):
            return False
        return not self._membership.awaits_workers and self._are_all_here(now) and not self._leasing.all_applied

    def _are_all_here(self, now: float) -> bool:
        """Whether all servers are heard of and have what they are to have, and so is everybody after another coordinator."""
        servers = self._leasing.servers
        silent = any(server.beat.round < 0 or now > server.heard_at + 2 * BEAT_S for server in servers)
        return not silent and not self._membership.lost_servers and not self._awaits_members(now)

    def _missing_text(self) -> str:
        """What each server has not got of the round that it is in, as far as it has said so."""
        beats = {server.name: server.beat for server in self._leasing.servers if server.beat.missing}
        return "".join(
            f"; {name} lacks micro-batch{'es' * (len(beat.missing) > 1)} {some([*map(str, beat.missing)])} of round {beat.round}"
            for name, beat in beats.items()
        )

    # ---- the trained model

    @property
    def _is_over(self) -> bool:
        """Whether all rounds are done that are known of."""
        return 0 < self._ledger.planned <= self._ledger.committed

    @property
    def _may_go_on(self) -> bool:
        """Whether more rounds may be to come when all are done that are known of: scripts loop over batches more than once, and
        none of them has ended by itself."""
        ended = any(worker.left and worker.ended_at >= 0 and not worker.failed for worker in self._membership.workers.values())
        return len(self._ledger.segments) > 1 and not ended

    @property
    def _has_model(self) -> bool:
        """Whether the model after the last round that is known of is written."""
        return self._model is not None and self._model.complete

    def _needs_servers(self) -> bool:
        """Whether the run cannot do without its servers: not once the model is written, unless scripts may ask for rows."""
        layout = self._ledger.layout
        has_rows = layout is not None and bool(layout.tables or layout.classifiers)
        return not self._has_model or (has_rows and bool(self._membership.names("worker")))

    def _new_model(self) -> ModelFile:
        setup, layout = self._ledger.setup, self._ledger.layout
        assert setup is not None and layout is not None
        return ModelFile(self._run_dir, setup.file, sizes(layout), rules_in(setup))

    def _is_trained(self, now: float) -> bool:
        """Whether the weights are final, as far as can be known: all rounds are done, and nobody has begun others."""
        rounds = self._ledger
        if rounds.layout is None or not self._membership.started or rounds.committed < rounds.planned:
            self._trained_since = None
            return False
        self._membership.over = self._is_over
        self._trained_since = now if self._trained_since is None else self._trained_since
        if not self._membership.names("worker"):
            return self._is_over or any(worker.left for worker in self._membership.workers.values())
        return self._is_over and now >= self._trained_since + _SETTLED_S

    def _collect(self, now: float) -> None:
        """Once the model is trained, get it from the servers, and have it under its name."""
        self._hashes = False
        if self._has_model or not self._is_trained(now):
            return
        try:
            if self._collecting is None or self._model is None:
                self._model = self._new_model()
                self._model.begin()
                self._collecting = ModelCollection(self._ledger.layout, self._ledger.committed)  # type: ignore[arg-type]
                self._progressed_at = now
            for server, body in self._collecting.ask(now):
                self._send(f"server-{server}", body)
            self._hashes = self._model.hash_some()
            if self._model.hashed:
                self._model.finish()
                self._collecting, self._progressed_at = None, now
                data = {"round": self._ledger.committed, "weights_sha256": self._model.weights_sha256}
                self._log.event(Event("model", "coordinator", data))
                log.info("the model of round %d is in %s", self._ledger.committed, self._run_dir / MODEL_FILE)
        except OSError as error:
            self._tell_of_unwritten(error)

    def _tell_of_unwritten(self, error: OSError) -> None:
        """Once in a while, for it is tried again."""
        now = time.monotonic()
        if now >= self._failure_told_at + ALARM_S:
            self._failure_told_at = now
            self.journal.warn(f"the model cannot be written to {self._run_dir}, and is tried again: {error.strerror or error}.")

    def _part(self, server: Member, body: ModelPart, frames: Frames, now: float) -> None:
        if self._collecting is None or self._model is None:
            return  # it was asked for before it was known that training goes on, or twice
        number = number_of(server.name)
        pieces = self._collecting.take(number, body, frames)
        try:
            self._model.write(pieces)
        except OSError as error:
            self._tell_of_unwritten(error)
            return  # it is asked for again
        self._collecting.took(number, body)
        self._progressed_at = now

    def _recomputed(self, route: bytes, body: Recomputed, frames: Frames) -> None:
        """Have in the model's file what workers have computed anew, unless they train on."""
        if body.id > self._revised and self._has_done_all(body.round):
            if self._model is None or not self._model.complete:
                return  # it is sent again
            try:
                self._model.revise(body.names, [bytes_of(frame) for frame in frames])
            except OSError as error:
                self._tell_of_unwritten(error)
                return
            self._revised = body.id
        self._reply(route, Accepted(Request.RECOMPUTED, body.id))

    def _train_on(self) -> None:
        """There are more rounds to do than were known of."""
        if self._model is not None:
            self._model.discard()
        self._model = self._collecting = self._trained_since = None
        for worker in self._membership.workers.values():
            if worker.left and worker.failed:
                raise ClusterError(f"{worker.name} failed: {worker.failed}")
            worker.failed = ""
        self._membership.train_on()
        self._note_early_leavers()

    # ---- messages

    def _handle(self, route: bytes, envelope: Envelope, frames: Frames) -> None:
        now = time.monotonic()
        if not envelope.run:
            hello = envelope.read_hello()
            if self._stop is None:
                self._hello(route, hello, envelope.incarnation, now)
            elif not self._stop.restart:  # else it asks the one that comes after this one
                self._late.add(envelope.incarnation)
                self._reply(route, self._stop)
            return
        member = self._membership.members.get(envelope.sender)
        if member is None or member.incarnation != envelope.incarnation:
            self._reply(
                route, Stop(False, f"{envelope.sender} is not a member of the run; it joins again as another.", restart=True)
            )
            raise WireError(f"{envelope.sender} is not a member of this run, or another process than the one that is", "sender")
        body = envelope.read()
        if not isinstance(body, _FROM[member.hello.role]):
            raise WireError(f"the coordinator has no use for {type(body).__name__} from {member.name}")
        if self._stop is not None:
            self._routes[member.name] = route
            self._reply(route, self._stop)
            return
        if member.lost:
            self._reply(route, self._membership.fence(member))
            return
        if member.name not in self._routes:
            self._know_again(route, member, now)
        self._membership.heard(member, now)
        self._routes[member.name] = route
        if isinstance(body, Heartbeat) and (news := self._membership.news(member, envelope.epoch, now)) is not None:
            self.journal.promise(route, news)
        match body:
            case Heartbeat():
                self._beat(member, body, now)
            case Report():
                self.journal.promise(route, self._ledger.report(number_of(member.name), body))
                failpoint("reported", body.version)
            case RoundReady() | Norms():
                self._decide(member, body)
            case CloseRound() | AllNorms() if member.hello.role == "server":
                self._to_servers(self._ledger.decided(body))
            case Setup():
                answer = self._ledger.set_up(body, member.who)
                if isinstance(answer, SetupReply):
                    first = next(iter(self._membership.names("worker")), member.name)
                    answer = SetupReply(member.name == first, self._membership.members[first].who)
                self._answer(route, member, answer)
            case Plan():
                self._plan(route, member, body, now)
            case RequestWork():
                if not self._awaits_members(now) and (lease := self._leasing.lease(member.name, body.round, now)) is not None:
                    self._give(lease)
            case CheckpointStatus():
                self._cuts.saved(number_of(member.name), body, now)
            case Mean():
                self._reply(route, self._ledger.mean(body))
            case Metrics():
                self._metrics(route, member, body, now)
            case ModelPart():
                self._part(member, body, frames, now)
            case Recomputed():
                self._recomputed(route, body, frames)
            case Goodbye():
                self._goodbye(route, member, body, now)

    def _hello(self, route: bytes, hello: Hello, incarnation: int, now: float) -> None:
        if hello.role == "server" and not is_address(hello.address):
            raise WireError(f"a server wants to join whose address is '{hello.address[:100]}', which is none")
        is_known = self._membership.knows(incarnation)
        started = self._membership.started
        member, answers = self._membership.hello(hello, incarnation, now, self._is_dead)
        if member is not None:
            self._routes[member.name] = route
            if not is_known:
                if hello.place.sees(here()) and Path(f"/proc/{hello.pid}").exists():
                    self._seen.add(hello.pid)
                if member.replaces:
                    self._ledger.replaced(number_of(member.name))
                    if self._collecting is not None:
                        self._collecting.replaced(number_of(member.name))
                data = {"host": hello.host, "pid": hello.pid, "arithmetic": hello.arithmetic, "address": hello.address}
                self._log.event(Event("joined", member.name, {**data, "place": hello.place.pids}))
                if member.proven:
                    self._progressed_at = now
        for _, body in answers:
            if isinstance(body, Refused) and now >= self._refused_at + _TELL_S:
                self._refused_at = now
                log.warning("a %s on %s may not join: %s", hello.role, printable(hello.host), printable(body.reason))
        self._tell_members(answers, route)
        if self._membership.started and not started:
            self._warn_of_unequal_arithmetic(self._membership.workers.values())
        elif started and not is_known and member is not None and hello.role == "worker":
            self._warn_of_unequal_arithmetic([member])

    def _tell_members(self, news: Sequence[tuple[str, Body]], asker: bytes | None = None) -> None:
        """Send what the membership says, to members by name and '' to `asker`, once it is in the books."""
        for name, body in news:
            to = self._routes.get(name) if name else asker
            if to is not None and isinstance(body, Welcome | MembershipUpdate | MembersLost):
                self.journal.promise(to, body, urgent=isinstance(body, Welcome))
            elif to is not None:
                self._reply(to, body)

    def _know_again(self, route: bytes, member: Member, now: float) -> None:
        """A member of old is here, having found this coordinator in place of the one before."""
        self._progressed_at = now
        if member.hello.role == "worker" and self._membership.started:  # what the one before told last may not be in the books
            self._reply(route, self._membership.shares)

    def _decide(self, server: Member, question: RoundReady | Norms) -> None:
        """Give the decision that all servers must take alike, if it is time. After another coordinator, the servers are asked for
        one that it may have given: by then it can have decided on no later round than that which the first question is about."""
        if question.coordinator != self._head.incarnation:
            return  # asked of the one before, whose answer may have come since
        number = number_of(server.name)
        answers = (
            self._ledger.arrived(number, question) if isinstance(question, RoundReady) else self._ledger.norms(number, question)
        )
        self._to_servers(answers)
        if self._recovered_at is not None and not answers:
            self._inherits_to = question.round if self._inherits_to is None else self._inherits_to
            if question.round <= self._inherits_to:
                for name in set(self._membership.names("server")) - {server.name}:
                    self._send(name, question)

    def _warn_of_unequal_arithmetic(self, workers: Iterable[Member]) -> None:
        """Equal bits need equal arithmetic: say so of each kind of worker that differs from the first, once."""
        first = next((self._membership.members[name] for name in self._membership.names("worker")), None)
        if first is None:
            return
        for member in workers:
            a, b = first.hello.arithmetic, member.hello.arithmetic
            keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
            kind = tuple(sorted(b.items()))
            if keys and kind not in self._arithmetic_told:
                self._arithmetic_told.add(kind)
                has = " and ".join(f"{key} {b.get(key, 'unknown')} where {first.who} has {a.get(key, 'unknown')}" for key in keys)
                self.journal.warn(f"{member.who} has {has}: the result is valid, but its bits depend on who computes what.")

    def _beat(self, member: Member, beat: Heartbeat, now: float) -> None:
        if _progress_of(beat) != _progress_of(member.beat):
            self._progressed_at = now
        if beat.unsteady and not member.beat.unsteady:
            self.journal.warn(_UNSTEADY.format(who=member.who, name=printable(beat.unsteady)))
        self._membership.beat(member.name, beat, now)
        self._tell_of_unreached(member)
        if now >= self._answered_at.get(member.name, 0.0) + BEAT_S / 2:  # beats with news come much more often
            self._answered_at[member.name] = now
            self._send(member.name, Heartbeat(leaves=member.name in self._dismissed))

    def _answer(self, route: bytes, worker: Member, answer: Body) -> None:
        """Tell a worker whether its model or data are the others'."""
        if isinstance(answer, Refused):
            self._unlike.add(worker.name)
        self.journal.promise(route, answer, urgent=True)

    def _plan(self, route: bytes, worker: Member, plan: Plan, now: float) -> None:
        trusted = self._membership.starters | self._ledger.contributors
        may_define = worker.name in trusted or trusted.isdisjoint(self._membership.names("worker"))
        answer = self._ledger.plan(plan.segment, plan.facts, worker.who, may_define)
        if isinstance(answer, PlanReply):
            answer = msgspec.structs.replace(answer, seal=seal(self._head.key, plan.segment))
        if answer is not None:
            self._answer(route, worker, answer)
        if self._ledger.planned != self._planned:
            self._planned, self._progressed_at = self._ledger.planned, now
            self._training_since = self._training_since or now
            merges = {"merges": True} if self._policy.is_local else {}
            self._log.event(Event("plan", "coordinator", {"rounds": self._planned, "epochs": self._ledger.passes, **merges}))
            if self._settings.policy in ("sync", "backup") and (spare := plan.segment.spare_workers(self._settings.workers)):
                self.journal.warn(spare)
            if self._ledger.committed < self._planned:
                self._train_on()

    def _give(self, lease: Reassign) -> None:
        self._log.event(Event("lease", lease.to, {"round": lease.round, "k": lease.micro_batch, "from": lease.owner}))
        self._send(lease.to, lease)
        self._send(lease.owner, lease)

    def _awaits_members(self, now: float) -> bool:
        """Whether this one has taken over just now and does not know yet what everybody does."""
        if self._recovered_at is None or now > self._recovered_at + _REJOIN_S:
            return False
        members = self._membership.members.items()
        return any(not member.lost and not member.early and name not in self._routes for name, member in members)

    def _metrics(self, route: bytes, worker: Member, metrics: Metrics, now: float) -> None:
        if (worker.incarnation, metrics.id) in self._seen_metrics:
            self.journal.promise(route, Accepted(Request.METRICS, metrics.id))
            return
        if not self._metrics_bytes.take(worker.name, sum(_ROW_BYTES + len(name) for name in metrics.values), now):
            raise WireError(f"{worker.name} logs more metrics than can be written down, and is to send them again later", "flood")
        self.journal.promise(route, Accepted(Request.METRICS, metrics.id))
        self._seen_metrics.add((worker.incarnation, metrics.id))
        self._progressed_at = now
        self._accuracy = measured(metrics.values, metrics.round) or self._accuracy
        for name, value in metrics.values.items():
            self._log.metric(metrics.round, worker.name, name, value, worker.incarnation, metrics.id)

    def _goodbye(self, route: bytes, member: Member, goodbye: Goodbye, now: float) -> None:
        if goodbye.reason and not self._is_over and not self._has_done_all(goodbye.round):
            self._script_failed(member, goodbye, now)
            return
        if not member.left:
            member.ended_at, member.failed = -1 if goodbye.early else goodbye.round, goodbye.reason
            self._tell_members(self._membership.leave(member.name, goodbye.early or bool(goodbye.reason)))
            self._log.event(Event("left", member.name, self._how_left(member, goodbye)))
            if goodbye.reason:
                self.journal.warn(
                    f"{member.name} failed after the last round, which changes nothing of the model: {goodbye.reason}"
                )
            if goodbye.changed:
                self.journal.warn(
                    f"the script of {member.name} has changed {some(goodbye.changed)} after the last round: {MODEL_FILE} has the "
                    "model of the last round, without that; a script can save its own with torch.save()."
                )
            self._progressed_at = now
            self._note_early_leavers()
        elif goodbye.early and not member.early:  # its script had ended, and it does not wait for the run's end
            self._tell_members(self._membership.leave(member.name, early=True))
        if goodbye.early and self._policy.is_local and not self._is_over and not member.lost:
            self._tell_members(self._membership.dismiss(member.name))
        if member.early:
            self.journal.promise(route, Stop(True))

    def _how_left(self, member: Member, goodbye: Goodbye) -> dict[str, Any]:
        how: dict[str, Any] = {"round": goodbye.round}
        if goodbye.early:
            how["early"] = True
        if goodbye.reason:
            how["failed"] = goodbye.reason
        return how

    def _has_done_all(self, round_: int) -> bool:
        """Whether who has so many rounds in its model has all that are known of."""
        return bool(self._ledger.segments) and round_ >= self._ledger.segments[-1].end

    def _note_early_leavers(self) -> None:
        """Have others do what those have not done whose scripts ended before the last round."""
        rounds = self._ledger
        for worker in self._membership.workers.values():
            if not worker.left or worker.early or worker.lost or not rounds.segments or self._has_done_all(worker.ended_at):
                continue
            text = f"{worker.name} left after round {worker.ended_at} of {rounds.segments[-1].end}, as its script ended"
            if self._policy.is_local:
                raise ClusterError(f"{text}, and policy {self._settings.policy} needs all workers up to the last round.")
            self._tell_members(self._membership.leave(worker.name, early=True))
            self.journal.warn(f"{text}; others do what it has not done.")

    def _script_failed(self, worker: Member, goodbye: Goodbye, now: float) -> None:
        """Go on without a worker whose script has failed, if others can do what it has not done and it is one that may fail:
        it is cut off from a server, or nothing of its work counts yet, or `worker_failures` admits it."""
        why = f"{_called(worker)} failed: {goodbye.reason}"
        if worker.early:  # it says so again
            self._send(worker.name, Stop(True))
            return
        is_new = self._is_beginner(worker)
        may_fail = goodbye.cut_off or is_new or self._admitted < self._settings.worker_failures
        if goodbye.used_kv or not may_fail or not self._can_do_without(worker):
            before = f" (before it, {some(self._failed)})" if self._failed else ""
            raise ClusterError(f"{why}{before}")
        self._admitted += not goodbye.cut_off and not is_new
        self._failed.append(why)
        kind = "cut off" if goodbye.cut_off else "beginner" if is_new else "admitted"
        self._give_up(worker, why, now, {"failed": kind})

    def _is_beginner(self, worker: Member) -> bool:
        """Whether nothing of a worker's is in the books. One that has begun with the others, and whose model or data differ from
        theirs before there is any round, is none: nobody knows who of them is right."""
        first = self._membership.tables[0]
        began_with_others = first.epoch == 1 and worker.name in first.workers and not self._ledger.committed
        return worker.name not in self._ledger.contributors and not (began_with_others and worker.name in self._unlike)

    def _can_do_without(self, worker: Member) -> bool:
        """Whether there are others who can do what a worker has not done, be that only to hand in the model."""
        others = [
            other for other in self._membership.workers.values() if other is not worker and not other.lost and not other.early
        ]
        is_over = bool(self._ledger.planned) and self._ledger.committed >= self._ledger.planned
        return not self._policy.is_local and any(other.active or is_over for other in others)

    def _behind_the_end(self) -> list[Member]:
        """Workers that have not got to the end of the rounds, which others have done."""
        rounds = self._ledger
        if not rounds.planned or rounds.committed < rounds.planned:
            return []
        active = [worker for worker in self._membership.workers.values() if worker.active]
        return [worker for worker in active if worker.reached < rounds.segments[-1].end and self._can_do_without(worker)]

    def _give_up(self, worker: Member, why: str, now: float, data: dict[str, str]) -> None:
        """Go on without a worker. `data` is for the event log."""
        if not worker.early:
            log.warning("%s is given up, and others do what it has not done: %s", worker.name, why)
            self._log.event(Event("lost", worker.name, {"why": why, "pid": worker.hello.pid, **data}))
            self._progressed_at = now
        self._tell_members(self._membership.leave(worker.name, early=True))
        self._send(worker.name, Stop(True))

    # ---- sending

    def _send(self, name: str, body: Body) -> None:
        if name in self._routes:
            self._reply(self._routes[name], body)

    def _reply(self, route: bytes, body: Body) -> None:
        send(self._sock, self._stamp.encode(body), to=route)

    def _to_servers(self, answers: Sequence[tuple[int, Body]]) -> None:
        for server, body in answers:
            self._send(f"server-{server}", body)

    def _farewell(self, stop: Stop) -> None:
        self._log.event(Event("stopped", "coordinator", msgspec.structs.asdict(stop)))
        self._flush()
        self._tell(stop)

    def _tell(self, stop: Stop) -> None:
        """Tell everybody that the run is over, a few times as messages may be lost, and close the books. In place of another
        coordinator, wait for those who have not found this one yet."""
        self._stop = stop
        until, told_at = time.monotonic() + (_FAREWELL_ANEW_S if stop.restart else _FAREWELL_S), float("-inf")
        while (now := time.monotonic()) < until or self._awaits_members(now) or self._awaits_late_ones(now - until):
            if now >= told_at + ASK_AGAIN_S / 4:
                told_at = now
                for route in self._routes.values():
                    self._reply(route, stop)
            self._sock.poll(TICK_MS)
            self._drain()
        with contextlib.suppress(Exception):  # it was told
            self._log.close()

    def _awaits_late_ones(self, waited_s: float) -> bool:
        """Whether somebody may yet come to a run that is over, and is to be told so."""
        heard, expected = len(self._routes) + len(self._late), self._settings.servers + self._settings.workers
        return self._late_s is not None and waited_s < self._late_s and heard < expected and not self._signal

    # ---- telling

    def _progress(self) -> float | None:
        """When something last moved. Called by the watchdog's thread."""
        return self._progressed_at if self._membership.started else None

    def _tell_of_unreached(self, worker: Member) -> None:
        """Repeat what a worker says of servers that it cannot reach, once of each process."""
        for number in worker.beat.unreached:
            server = self._membership.servers.get(f"server-{number}")
            if server is not None and (pair := (worker.incarnation, server.incarnation)) not in self._told_unreached:
                self._told_unreached.add(pair)
                self.journal.warn(_cannot_reach(worker, server))

    def _unreached(self) -> str:
        """Which workers cannot reach which servers; '' if all can."""
        servers, active = self._membership.servers, self._membership.names("worker")
        workers = [worker for name in active if (worker := self._membership.members[name]).beat.unreached]
        pairs = [(w, servers[name]) for w in workers for n in w.beat.unreached if (name := f"server-{n}") in servers]
        return some([_cannot_reach(worker, server) for worker, server in pairs])

    def _whom_all_wait_for(self) -> str:
        """Workers that have something left to do in the open round, else servers that have not applied it."""
        if unreached := self._unreached():
            return f"a connection ({unreached})"
        members = self._membership.members
        round_ = self._ledger.committed
        if gone := self._membership.lost_servers:
            return f"another process in the place of {some(gone)}"
        busy = [n for n in self._membership.names("worker") if members[n].beat.state != "waiting"]
        if busy:
            return some(busy)
        return some([n for n in self._membership.names("server") if members[n].beat.round <= round_])

    def _write_status(self) -> None:
        waits_for = self._whom_all_wait_for() if self._membership.started else ""
        for member in self._membership.members.values():
            beat = member.beat
            state = "lost" if member.lost else "done" if member.left else beat.state or "starting"
            waits = waits_for if state == "waiting" and member.hello.role == "worker" else ""
            self._log.status(StatusRow(member.name, state, beat.round, waits, beat.rate))

    def _finished(self) -> bool:
        """All workers have left, the books are complete, and the model is written."""
        if not self._membership.started or self._membership.names("worker"):
            return False
        if self._ledger.layout is None:
            return any(worker.left for worker in self._membership.workers.values())
        if not self._has_model or self._may_go_on:
            return False
        return self._cuts.ended(self._ledger.committed) or bool(self._membership.lost_servers)

    def _write_results(self) -> None:
        try:
            failpoint("ending", self._ledger.committed)
            write_summary(self._run_dir, self._summary())
        except OSError as error:
            raise self._unwritten(error) from None

    def _unwritten(self, error: OSError) -> ClusterError:
        return ClusterError(f"the results could not be written to {self._run_dir}: {error.strerror or error}.")

    def _summary(self) -> dict[str, Any]:
        totals = self._ledger.totals
        began, ended = self._training_since, self._committed_at
        seconds = ended - began if began is not None and ended is not None else 0.0
        summary: dict[str, Any] = {
            "run": self._run,
            "policy": self._settings.policy,
            "workers": self._settings.workers,
            "servers": self._settings.servers,
            "samples": totals.samples,
            "seconds": round(seconds, 3),
            "samples_per_second": round((totals.samples - self._samples_before) / seconds, 1) if seconds else None,
            **results(self._ledger, self._policy, self._accuracy),
            "weights_sha256": self._model.weights_sha256 if self._model is not None else None,
            "micro_batches_committed": totals.micro_batches_committed,
            "micro_batches_recomputed": totals.micro_batches_recomputed,
            "duplicates_ignored": totals.duplicates_ignored,
            "dropped": totals.dropped,
            "samples_dropped": totals.samples_dropped,
            "wire": self._wire(),
            "refused": dict(sorted(self._refused().items())),
        }
        workers = self._membership.workers.values()
        if early := {
            worker.name: worker.ended_at for worker in workers if worker.early and worker.ended_at >= 0 and not worker.failed
        }:
            summary["left_early"] = early
        if failed := {worker.name: worker.failed for worker in workers if worker.failed}:
            summary["failed_after_the_last_round"] = failed
        if self._samples_before:
            summary["samples_before_resume"] = self._samples_before  # which `seconds` does not cover
        if totals.dropped_in_part:
            summary["dropped_in_part"] = totals.dropped_in_part
        if self._failed:
            summary["workers_failed"] = self._failed
        if totals.staleness:
            summary["staleness"] = {str(k): n for k, n in sorted(totals.staleness.items())}
        return summary

    def _refused(self) -> Counter[str]:
        """Messages that were refused by kind, here and by all who have told."""
        told = (member.beat.refused for member in self._membership.members.values())
        return sum((Counter(counts) for counts in told), Counter(self._refusals.counts))

    def _wire(self) -> dict[str, float]:
        """What all processes have told of tensors in frames: bytes of workers, seconds of workers and servers."""
        told = [msgspec.structs.asdict(member.beat.traffic) for member in self._membership.members.values()]
        return {key: round(sum(traffic[key] for traffic in told), 3) for key in Traffic.__struct_fields__}


def _progress_of(beat: Heartbeat) -> tuple[int, int, int, str]:
    return beat.round, beat.micro_batch, beat.progress, beat.state


def _called(member: Member) -> str:
    """A member's name and host, for people."""
    host = printable(member.hello.host)
    return f"{member.name} on {host}" if host else member.name


def _cannot_reach(worker: Member, server: Member) -> str:
    return (
        f"{_called(worker)} cannot reach {_called(server)} at {printable(server.hello.address)}: see its --listen and --advertise"
    )
