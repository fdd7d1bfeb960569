"""The calls of a script besides its loop: deciding together, hooks, and going on after a resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, Unpack

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from roundtable.common.runtime.errors import UsageError, at_script_line
from roundtable.worker.data.arguments import BatchArguments, resolve
from roundtable.worker.session.session import Session
from roundtable.worker.session.training import Training
from roundtable.worker.together.collectives import Means
from roundtable.worker.together.epoch_metrics import EpochMetrics
from roundtable.worker.together.script_state import ScriptState

F = TypeVar("F", bound=Callable[[], object])


class Deciding:
    """A base of `Run`."""

    def __init__(self, session: Session) -> None:
        self._session = session
        #: The device for the tensors of the training loop.
        self.device = (
            torch.device("cuda", session.context.index % torch.cuda.device_count())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
        self._model: nn.Module | None = None

    def agree(self, value: Any) -> Any:
        """Return the chief's `value` on every worker: None, a number, a string, bytes, or lists and dicts of these, up to 64 KiB.

        Every worker calls this, in the same order, between two loops over batches. A worker that joins later gets the same value
        at the same place of its script. Raises UsageError, with the script's line, inside a loop or for another value, and
        ClusterError if the chief does not come in time (`--progress-timeout`).
        """
        return self._session.collectives.agree(value)

    def evaluate(
        self, function: Callable[[Any], Means], dataset: Dataset[Any] | DataLoader[Any], **arguments: Unpack[BatchArguments]
    ) -> dict[str, float]:
        """Measure the model together with all other workers, and return the same means on each.

        `function(batch)` returns a dict of means over the batch, or a pair of such a dict and the batch's weight, which is its
        number of samples by default. Each batch is computed by some worker, on `device`, with the model in evaluation mode and
        without gradients. The results are the weighted means over all batches, with the same bits on any number of workers. They
        are logged as those of held-out samples. `arguments` are those of `batches` about samples and their order, which is the
        data set's own by default; `micro_batch` is the size of a batch.

        Every worker calls this, in the same order and with the same data, between two loops over batches. Raises UsageError
        inside a loop, before the first one, or if `function` returns something else.
        """
        if self._model is None or not self._session.has_trained:
            raise UsageError("run.evaluate() measures a model in training: call it after a loop over run.batches().")
        if not isinstance(dataset, DataLoader) and not arguments.keys() & {"order", "sampler", "shuffle"}:
            arguments["shuffle"] = False
        try:
            data = resolve(dataset, arguments, self._session.context.settings.seed, 0)
        except UsageError as error:
            raise at_script_line(error) from None
        return self._session.collectives.evaluate(function, data, self._model, device_of(self._model, self.device))

    def save(self, name: str) -> None:
        """Save the model as it is now, as `models/NAME.safetensors` in the run directory. Replace an earlier one.

        The file is made like that of the trained model, from the servers' weights. Every worker calls this, in the same order,
        between two loops over batches. Raises UsageError inside a loop, before the first one, or for a name that is none.
        """
        if not self._session.has_trained:
            raise at_script_line("run.save() saves a model in training: call it after a loop over run.batches().")
        self._session.ending.await_recomputed()
        self._session.collectives.save(name)

    @property
    def metrics(self) -> EpochMetrics:
        """The means of what scripts have logged for their batches, over the newest data epoch that is done.

        `run.metrics["loss"]` is the same number on every worker. Raises KeyError if nothing of that name was logged.
        """
        return self._session.metrics

    def _training(self, call: str) -> Training:
        """Return the training that the script has set up. Raises UsageError if it has not, and names the `call`."""
        if self._session.training is None:
            raise at_script_line(f"{call} needs an optimizer: call run.optimizer(...) before it.")
        return self._session.training

    # ---- once a round

    def on_round(self, function: F) -> F:
        """Call `function()` at the end of each round, once for a round however many micro-batches this worker computes.

        It is called on the script's thread between two batches: before the loop over `batches` yields the first batch of the next
        round, and before the loop ends. The model then has all weights and buffers of the round's end. Under `sync` and `backup`
        these are the same on all workers. `round` is the number of rounds that they include: 1 at the first call. Several
        functions are called in the order in which they were registered. Returns `function`, so this may be a decorator.

        A worker that takes part from the start and keeps up is called for every round, in order. A worker that joins later, or
        goes on from a checkpoint, is called from the first round on that ends after it has got its weights. Servers keep the
        weights of the newest rounds only. A worker that is further behind misses some rounds, `round` jumps, and a warning says
        so. The last round of the run is never missed.

        Under `ssp` and `async`, a round ends for each worker when it goes on, and models differ. Under `local` and `average`, a
        round is an own step of the worker. If a merge follows, the model is the merged one.

        The function may call `log` and `stop`, and set numbers in `param_groups`. If all workers call `stop` in the same round,
        the run ends with just that round; under `local` and `average`, with the merge. Gradients that it leaves are dropped,
        and buffers are reset. Raises UsageError before `optimizer`. The loop raises it, and names the function, if a parameter
        was changed: `replicate` says which changes are allowed.
        """
        work = self._training("run.on_round()").work
        work.hooks.add(function, work.round)
        return function

    # ---- going on

    @property
    def state(self) -> ScriptState:
        """The script's own state by name, such as its best accuracy so far. It is there again after a resume.

        Every script sets the same values, best between two loops over batches: `run.state["best"] = accuracy`. They belong to the
        round in which they are set, and come back if the run is resumed from a later one. A worker that joins late gets them too.
        A value is None, a number, a string, bytes, a tensor, or a list or dict of these; all have 1 MiB together at most.

        Raises UsageError before `run.optimizer`, or for another value.
        """
        self._training("run.state")
        return self._session.state

    def epochs(self, count: int | None = None) -> Iterator[int]:
        """Yield the numbers of the epochs that are left to do of `count` (by default the run's `--epochs`), from 0.

        Each epoch has one loop over `run.batches`, which makes one pass over the data if it does not say otherwise. In a new run
        these are all epochs. A script that resumes a run, or joins late, begins with the epoch whose loop has the newest round.
        If that was the loop's last round, the loop yields nothing, and what follows in the epoch is done again. There are no
        more epochs after `stop`, or when the run has its `--rounds`.

        Raises UsageError before `run.optimizer`, or if an epoch had no loop or several.
        """
        segments = self._session.segments
        self._training("run.epochs()")
        before = segments.begun
        first = self._session.skip_loops() - before
        for epoch in range(first, self._session.context.settings.epochs if count is None else count):
            if self.stopped or segments.reached_limit:
                return
            segments.one_epoch_each = True
            try:
                yield epoch
            finally:
                segments.one_epoch_each = False
            if segments.begun != before + epoch + 1 and not self.stopped:
                raise at_script_line(
                    f"run.epochs() needs one loop over run.batches() in each epoch, and epoch {epoch} had "
                    f"{segments.begun - before - epoch}."
                )

    # ---- the end

    def stop(self, reason: str) -> None:
        """Have the run end here, on all workers after the same round: early stopping.

        The run ends as if that round were its last planned one: with the model, a summary, a last checkpoint and exit code 0.
        The loop over `batches` ends there, and later loops yield nothing. The summary and the launcher's last lines have the
        `reason` and the worker that asked. Any worker may call this, several may, and at any place of the script after its first
        batch. The first call counts.

        This returns when the coordinator and all servers have agreed on the last round. If every worker calls this at the same
        `round` n, the run has exactly n rounds (at least one), on any cluster. If only some workers do, the others may have
        completed more rounds meanwhile, and these count. A round that no server has begun to apply is left out. Under `ssp` and
        `async` the last round is the newest that any worker has begun. Under `local` and `average` the run ends after a merge:
        the last one, or the next if this worker has stepped since.

        Raises UsageError before the first batch, and NoAnswer if the coordinator does not answer in time.
        """
        self._session.end_run(str(reason))

    @property
    def stopped(self) -> bool:
        """True once this worker knows that the run ends early, because a script has called `stop`."""
        return self._session.departure.ends_after is not None


def device_of(model: nn.Module, device: torch.device) -> torch.device:
    """Return the device for batches: `device` if the model is there, else the CPU."""
    return device if any(tensor.device == device for tensor in model.parameters()) else torch.device("cpu")
