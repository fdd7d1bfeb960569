"""The training that a script has set up by `run.optimizer()`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.client.context import WorkerContext
from roundtable.worker.client.push_pull import ParameterClient
from roundtable.worker.facts import ScheduleFacts
from roundtable.worker.loop.gradient_loop import GradientLoop
from roundtable.worker.loop.local_sgd import LocalSgdLoop
from roundtable.worker.loop.weight_fetcher import fetch_again
from roundtable.worker.model_setup import ModelSetup

log = logging.getLogger("roundtable.worker.run")


@dataclass(frozen=True)
class Training:
    """A model's loop, and the client of the servers that have its weights."""

    context: WorkerContext
    setup: ModelSetup
    client: ParameterClient
    work: GradientLoop | LocalSgdLoop
    #: None if there is no schedule to compare between workers.
    schedule: ScheduleFacts | None

    def begin(self) -> None:
        """Put the run's weights into the model. If the run has none yet, send this model's weights if they are the first ones."""
        work, setup = self.work, self.setup
        if setup.begins_later:
            setup.send_first_weights()
        else:
            written = work.edits.written()
            if not written:
                return
            changed = f"the script has changed {work.edits.named(written)} after run.optimizer()"
            if setup.begins:
                raise UsageError(
                    f"{changed}, which has sent the first weights: in a model with tables or sharded layers, change them before."
                )
            log.warning("%s, but the run has weights already: these replace the changes.", changed)
            self.client.want_all()
        work.join()

    def full_precision(self) -> dict[int, Any]:
        """Return the servers' own weights for the model's round, by chunk.

        Return an empty dict if no codec rounds the model's weights, or if the round is over.
        """
        work = self.work
        if self.context.settings.compress_weights == "none" or not isinstance(work, GradientLoop):
            return {}
        version = work.version()
        if version is None:
            return {}
        return fetch_again(self.context, self.client, version, "the trained weights", full_precision=True) or {}
