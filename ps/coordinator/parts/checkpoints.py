"""Takes checkpoints: makes folders, sends messages, and writes manifests. The checkpoint scheduler decides when."""

from __future__ import annotations

import logging
import secrets
import time

from roundtable.common.config.settings import flat
from roundtable.common.protocol.effects import number_of
from roundtable.common.protocol.messages.saving import CheckpointStatus
from roundtable.common.runtime.failpoints import failpoint
from roundtable.common.runtime.versions import versions_here
from roundtable.common.storage.checkpoint import (
    TOKEN_FILE,
    FileEntry,
    Manifest,
    file_of,
    folder_of,
    folders,
    remove,
    write_manifest,
)
from roundtable.common.storage.event_log import Event
from roundtable.ps.coordinator.checkpoint_scheduler import CheckpointInProgress, CheckpointScheduler
from roundtable.ps.coordinator.context import Received, RunContext
from roundtable.ps.coordinator.group_commit import ALARM_S
from roundtable.ps.coordinator.parts.departures import Departures

log = logging.getLogger("roundtable.ps.coordinator")


class CheckpointDriver:
    """Begins checkpoints, asks servers for their files, and writes the manifest."""

    def __init__(self, context: RunContext, departures: Departures, now: float) -> None:
        self._context = context
        self._departures = departures
        self.scheduler = CheckpointScheduler(context.settings.checkpoint_every, now)
        #: The versions of the packages that this process has loaded, whatever is installed later.
        self._versions = versions_here()
        #: When a failed checkpoint was last reported.
        self._failure_reported_at = float("-inf")

    def tick(self, now: float, is_stopping: bool) -> None:
        """Begin a checkpoint that is due, ask servers for missing files, and finish a complete checkpoint.

        With `is_stopping`, workers leave before the last round.
        """
        context, scheduler = self._context, self.scheduler
        ledger, membership = context.ledger, context.membership
        if ledger.layout is None or not membership.started or membership.lost_servers:
            return
        servers = {owner: max(0, membership.servers[f"server-{owner}"].heartbeat.round) for owner in ledger.layout.owners()}
        done = ledger.committed >= ledger.planned
        ended = not membership.names("worker") and (done or is_stopping)
        if scheduler.in_progress is not None and scheduler.in_progress.round > ledger.planned:  # the run ends before
            remove(folder_of(context.run_dir, scheduler.give_up()))
        if self._departures.all_have_left(now) and ledger.committed > 0:
            ended = True
            if scheduler.in_progress is not None and scheduler.in_progress.round > max(servers.values()):
                remove(folder_of(context.run_dir, scheduler.give_up()))
        round_ = scheduler.due(servers, ledger.planned, ended, now)
        if round_ is not None:
            self._begin(round_, now, ended)
        for server, request in scheduler.ask(servers, now):
            context.mail.send(f"server-{server}", request)
            failpoint("cutting", request.round)
        outcome, in_progress = scheduler.outcome(servers, now), scheduler.in_progress
        if outcome and in_progress is not None:
            self._end(in_progress, outcome, now)

    def note_status(self, message: Received[CheckpointStatus]) -> None:
        """Note a server's status of its part of the checkpoint."""
        self.scheduler.note_status(number_of(message.member.name), message.body, message.now)

    def _begin(self, round_: int, now: float, final: bool) -> None:
        folder, token = folder_of(self._context.run_dir, round_), secrets.token_hex(8)
        self.scheduler.begin(round_, token, now, final)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TOKEN_FILE).write_text(token, encoding="utf-8")
        except OSError as error:
            remove(folder)
            self.scheduler.end(f"{folder} cannot be written: {error.strerror or error}.", now)
            self._tell_of_failure(self.scheduler.failure)

    def _end(self, in_progress: CheckpointInProgress, outcome: str, now: float) -> None:
        """End a checkpoint whose `outcome` is "complete", or the reason why it failed."""
        if outcome == "complete":
            if self._context.ledger.committed < in_progress.round:
                return  # wait until the ledger has all rounds of the checkpoint
            outcome = self._finish(in_progress)
        if outcome:
            remove(folder_of(self._context.run_dir, in_progress.round))
        self.scheduler.end(outcome, now)
        if self.scheduler.failure:
            self._tell_of_failure(outcome)

    def _finish(self, in_progress: CheckpointInProgress) -> str:
        """Write the event log and then the manifest, and remove old checkpoints. Return why that failed, or ''."""
        context, round_ = self._context, in_progress.round
        assert context.ledger.setup is not None
        files = {file_of(server): FileEntry(said.sha256, said.bytes) for server, said in in_progress.said.items()}
        manifest = Manifest(
            run=context.run,
            round=round_,
            servers=context.settings.servers,
            setup=context.ledger.setup,
            settings=flat(context.settings),
            files=files,
            versions=self._versions,
        )
        try:
            context.enter(time.monotonic())
            context.log.flush()
            failpoint("completing", round_)
            write_manifest(folder_of(context.run_dir, round_), manifest)
        except Exception as error:  # a failed checkpoint must not end the run
            return f"the checkpoint of round {round_} could not be finished: {error}."
        for old in folders(context.run_dir)[: -context.settings.keep_checkpoints]:
            remove(old)
        self._failure_reported_at = float("-inf")
        size = sum(entry.bytes for entry in files.values())
        context.log.event(Event("checkpoint", "coordinator", {"round": round_, "bytes": size}))
        log.info("checkpoint of round %d: %.1f MB", round_, size / 1e6)
        return ""

    def _tell_of_failure(self, reason: str) -> None:
        """Warn once in a while that there is no checkpoint. The next try may soon fail for the same reason."""
        now = time.monotonic()
        if now >= self._failure_reported_at + ALARM_S:
            self._failure_reported_at = now
            self._context.journal.warn(f"no checkpoint: {reason}")
