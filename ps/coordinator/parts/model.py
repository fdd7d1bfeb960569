"""Gets the parts of the trained model from the servers, and writes the model's file."""

from __future__ import annotations

import logging
import time

from roundtable.common.protocol.effects import number_of
from roundtable.common.protocol.messages.saving import ModelPart, Recomputed
from roundtable.common.protocol.messages.setup import Accepted, Request
from roundtable.common.protocol.transport import bytes_of
from roundtable.common.storage.event_log import Event
from roundtable.common.storage.run_files import MODEL_FILE, SAVED_MODELS
from roundtable.ps.coordinator.context import Received, RunContext
from roundtable.ps.coordinator.group_commit import ALARM_S
from roundtable.ps.coordinator.model_collection import ModelCollection
from roundtable.ps.coordinator.recovery import RestoredRun
from roundtable.ps.coordinator.results import ModelFile, rules_in
from roundtable.ps.coordinator.state.ledger import SavedModel
from roundtable.ps.model_parts import sizes

log = logging.getLogger("roundtable.ps.coordinator")

#: Seconds after the last round in which a script may begin another loop. After that the model counts as trained.
_SETTLED_S = 0.3


class ModelCollector:
    """Collects the model once all known rounds are done."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        #: The file, while it is written and when it is complete.
        self._file: ModelFile | None = None
        #: The collection of parts, until the file is complete.
        self.collecting: ModelCollection | None = None
        #: Since when all known rounds have been done, or None.
        self._trained_since: float | None = None
        #: True if more bytes can be hashed at once.
        self.hashes = False
        #: The number of the last `Recomputed` that is in the file.
        self._revised = -1
        #: When a failure to write the model was last reported.
        self._failure_reported_at = float("-inf")

    @property
    def is_complete(self) -> bool:
        """Return whether the model after the last known round is written."""
        return self._file is not None and self._file.complete

    @property
    def weights_sha256(self) -> str | None:
        """Return the hash of the model's parameters, once the model is complete."""
        return self._file.weights_sha256 if self._file is not None else None

    def recover(self, restored: RestoredRun) -> None:
        """Take over the file that the coordinator before has completed, if it still exists."""
        if restored.model is not None and restored.model[1] == self._context.ledger.planned:
            self._file = self._new_file()
            self._file.restore(restored.model[0])

    def needs_servers(self) -> bool:
        """Return whether the run needs its servers: until the model is written, and while scripts may ask for rows."""
        layout = self._context.ledger.layout
        has_rows = layout is not None and bool(layout.tables or layout.sharded_layers)
        return not self.is_complete or (has_rows and bool(self._context.membership.names("worker")))

    def tick(self, now: float) -> None:
        """Collect the model from the servers once it is trained. Finish its file when all parts are there."""
        self.hashes = False
        if self.is_complete or not self._is_trained(now):
            return
        try:
            if self.collecting is None or self._file is None:
                self._file = self._new_file()
                self._file.begin()
                self.collecting = ModelCollection(self._context.ledger.layout, self._context.ledger.committed)  # type: ignore[arg-type]
                self._context.progressed_at = now
            for server, body in self.collecting.ask(now):
                self._context.mail.send(f"server-{server}", body)
            self.hashes = self._file.hash_some()
            if self._file.hashed:
                self._finish(self._file, now)
        except OSError as error:
            self._tell_of_unwritten(error)

    def take_part(self, message: Received[ModelPart]) -> None:
        """Write a part of the model. Raises WireError if the part was not asked for or has the wrong size."""
        if self.collecting is None or self._file is None:
            return  # the part came twice, or training goes on
        number = number_of(message.member.name)
        pieces = self.collecting.take(number, message.body, message.frames)
        try:
            self._file.write(pieces)
        except OSError as error:
            self._tell_of_unwritten(error)
            return  # the coordinator asks for the part again
        self.collecting.took(number, message.body)
        self._context.progressed_at = message.now

    def recomputed(self, message: Received[Recomputed]) -> None:
        """Write tensors that a worker has recomputed to the model's file, unless training goes on."""
        body = message.body
        if body.id > self._revised and self._context.has_done_all(body.round):
            if self._file is None or not self._file.complete:
                return  # the worker sends it again
            try:
                self._file.revise(body.names, [bytes_of(frame) for frame in message.frames])
            except OSError as error:
                self._tell_of_unwritten(error)
                return
            self._revised = body.id
        self._context.mail.reply(message.route, Accepted(Request.RECOMPUTED, body.id))

    def save_as(self, name: str) -> bool:
        """Save the complete model as `name` too. Return False if that fails, and is to be tried again."""
        context = self._context
        assert self._file is not None
        try:
            self._file.save_as(context.run_dir / SAVED_MODELS / f"{name}.safetensors")
        except OSError as error:
            self._tell_of_unwritten(error)
            return False
        saved = SavedModel(context.ledger.done[0], self._file.weights_sha256 or "")
        context.ledger.saved[name] = saved
        context.log.event(Event("saved", "coordinator", {"name": name, "round": saved.round}))
        return True

    def server_replaced(self, number: int) -> None:
        """Ask the process that replaces server `number` for the server's parts."""
        if self.collecting is not None:
            self.collecting.replaced(number)

    def discard(self) -> None:
        """Forget the model, because training goes on."""
        if self._file is not None:
            self._file.discard()
        self._file = self.collecting = self._trained_since = None

    def _new_file(self) -> ModelFile:
        setup, layout = self._context.ledger.setup, self._context.ledger.layout
        assert setup is not None and layout is not None
        return ModelFile(self._context.run_dir, setup.file, sizes(layout), rules_in(setup))

    def _finish(self, file: ModelFile, now: float) -> None:
        context = self._context
        file.finish()
        self.collecting, context.progressed_at = None, now
        data = {"round": context.ledger.committed, "weights_sha256": file.weights_sha256}
        context.log.event(Event("model", "coordinator", data))
        log.info("the model of round %d is in %s", context.ledger.committed, context.run_dir / MODEL_FILE)

    def _is_trained(self, now: float) -> bool:
        """Return whether the weights seem final: all rounds are done, and no worker has begun others."""
        ledger, membership = self._context.ledger, self._context.membership
        if ledger.layout is None or not membership.started or ledger.committed < ledger.planned:
            self._trained_since = None
            return False
        membership.over = self._context.is_over
        self._trained_since = now if self._trained_since is None else self._trained_since
        if not membership.names("worker"):
            return self._context.is_over or any(worker.left for worker in membership.workers.values())
        return self._context.is_over and now >= self._trained_since + _SETTLED_S

    def _tell_of_unwritten(self, error: OSError) -> None:
        """Warn that the model cannot be written, once in a while. The coordinator tries again."""
        now = time.monotonic()
        if now >= self._failure_reported_at + ALARM_S:
            self._failure_reported_at = now
            reason = error.strerror or error
            self._context.journal.warn(f"the model cannot be written to {self._context.run_dir}, and is tried again: {reason}.")
