"""`Run`: the object that a training script holds. It keeps a replica up to date and hands in contributions.

Everything here happens on the script's own thread. Sockets are served by `roundtable.worker.client.io_thread`. The state machines
in `roundtable.worker.loop.task_queue` and `roundtable.worker.client.push_pull` decide what to compute next and what to send
again. Both threads use them under one lock. The parts behind `Run` are in `roundtable.worker.session`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.data import Dataset

from roundtable.common.config.settings import Settings
from roundtable.common.protocol.messages.session import Traffic
from roundtable.common.runtime.errors import UsageError
from roundtable.worker import tensor_names
from roundtable.worker.client.io_thread import IoThread
from roundtable.worker.client.kv_client import KvClient
from roundtable.worker.merge import batchnorm, constraints
from roundtable.worker.optim.optimizer import Optimizer, Per, Schedule
from roundtable.worker.preparation import OptimizerCall
from roundtable.worker.replica.buffers import Rules
from roundtable.worker.session.segments import Samples
from roundtable.worker.session.session import Session

M = TypeVar("M", bound=nn.Module)


class Run:
    """A script's part in a run. Made by `roundtable.join`."""

    def __init__(self, link: IoThread) -> None:
        self._session = session = Session(link)
        context = session.context
        #: The run's settings, from flags or a file.
        self.settings: Settings = context.settings
        #: This worker's number, from 0.
        self.index = context.index
        self.name = context.name
        #: The device that tensors of the training loop belong on.
        self.device = (
            torch.device("cuda", self.index % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
        )
        self._model: nn.Module | None = None
        self._buffer_rules: Rules = {}
        #: Whether a loop over batches goes on, or was left before its end.
        self._is_training = True
        #: Whether the script was interrupted, so that what it was at is given up.
        self.interrupted = False
        #: Why the script failed, if it did: told to the coordinator in `finish`.
        self.failure = ""
        #: Whether that was for a server that did not answer.
        self.cut_off = False

    # ---- what a script may ask

    @property
    def is_chief(self) -> bool:
        """True on one worker, the one with the lowest number: for what needs doing once, such as evaluation."""
        return self._session.tasks.is_chief

    @property
    def workers(self) -> int:
        """Workers that take part now."""
        return len(self._session.tasks.tables[-1].workers)

    @property
    def round(self) -> int:
        """Rounds before this one are in the weights of the model."""
        return self._session.round

    @property
    def epoch(self) -> int:
        """The epoch that the current round belongs to; after the last round, the number of epochs done."""
        work = self._session.work
        return work.epoch if work is not None else 0

    # ---- setting up

    def replicate(self, model: M, buffers: Rules | None = None) -> M:
        """Make `model` this worker's replica: it gets the cluster's weights at the first batch and at every round's end.

        The first weights are those that the first worker's model has at its first `batches()`. Other workers have their own until
        theirs. In a model with row-sparse tables or sharded layers `optimizer` sends the first weights. If the run has weights
        already, as it goes on or as this worker joins later, `optimizer` puts these into the model.

        From then on servers hold all parameters, frozen ones too, and a script must not change them: `step` raises UsageError and
        names the parameter. Under `local` and `average` this is so for frozen ones alone. A script may write other values and put
        the old ones back before it goes on, but not under `ssp` and `async`. Writes to `parameter.data` are not seen: they are
        lost.

        Each micro-batch begins with the buffers as they were at the round's beginning. Running statistics of normalisation layers
        become the mean of what micro-batches make of them, weighted by samples. Any other buffer gets the value that the last
        micro-batch in order has left, of those that changed it. `buffers` says otherwise: it maps names, or patterns with `*`, to
        `mean`, `max`, `last`, `sum` (of what each micro-batch adds, as of a counter of tokens), or `own` (each worker has its
        own, as of a cache). A buffer that the model's file has not (`persistent=False`) does not travel unless it is named, and
        must not change.

        The weight of a trained `nn.Embedding(sparse=True)` is on the servers alone. This worker fetches the rows that a batch
        looks up, and `weight` is an empty tensor of device "meta". `roundtable.embedding` makes a layer that never had memory
        here.

        Convert the model to its dtype before. Where torch.compile has made it, or a part of it, tensors have the names that
        they had before.
        """
        if self._model is not None:
            raise UsageError("replicate() was called twice; a run trains one model.")
        self._model, self._buffer_rules = tensor_names.uncompiled(model), dict(buffers or {})
        return model

    def optimizer(
        self,
        cls: type[torch.optim.Optimizer],
        params: Iterable[Any] | None = None,
        *,
        schedule: Schedule | None = None,
        schedule_per: Per = "round",
        clip_norm: float | None = None,
        **hyper: Any,
    ) -> Optimizer:
        """Say how the weights are updated; the update runs on the servers (under `local` and `average`, here).

        `cls` is a class of torch.optim and `hyper` its arguments; `params` are parameters or groups as torch.optim takes
        them, all of the model's by default. `schedule` makes a scheduler of torch.optim.lr_scheduler for the optimizer it is
        given, which is stepped by itself every round or epoch: `schedule=lambda o: StepLR(o, 30)`. ReduceLROnPlateau, once an
        epoch, gets the epoch's mean of the `loss` that was logged for each batch. `clip_norm` bounds the 2-norm of the whole
        gradient as torch.nn.utils.clip_grad_norm_ does. The bits are those of the same class in plain PyTorch; `fused=True` takes
        torch's fused kernel, which for Adam halves the servers' time.

        Raises UsageError for a class, settings or parameters that cannot be trained this way, saying why.
        """
        if self._model is None:
            raise UsageError("optimizer() needs a model: call run.replicate(model) before it.")
        if self._session.training is not None:
            raise UsageError("optimizer() was called twice; a run has one optimizer, which may have several groups.")
        call = OptimizerCall(cls, hyper, schedule, schedule_per, clip_norm)
        training, optimizer = self._session.assembly.assemble(self._model, self._buffer_rules, params, call)
        self._session.training = training
        if not training.setup.begins_later:
            training.work.join()
        return optimizer

    # ---- training

    def batches(
        self,
        dataset: Dataset[Any],
        *,
        micro_batch: int | None = None,
        global_batch: int | None = None,
        epochs: int | None = None,
        shuffle: bool = True,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> Iterator[Any]:
        """Yield this worker's micro-batches of `epochs` passes over a map-style dataset, until all rounds are complete.

        The run's settings stand in for arguments that are left out. Every worker must pass the same dataset and sizes. After each
        batch call `loss.backward()` and `opt.step()`; the loss is a mean over the micro-batch. May be called again, for example
        once an epoch: rounds and epochs go on counting. `num_workers` processes load samples ahead.

        Raises UsageError where the dataset is not map-style, or `step` was not called for a batch.
        """
        session, training = self._session, self._session.training
        if training is None:
            raise UsageError("batches() needs an optimizer: call run.optimizer(...) before it.")
        segment = session.segments.plan(dataset, micro_batch, global_batch, epochs)
        if session.segments.none:
            training.begin()
        samples = Samples(dataset, shuffle, num_workers, collate_fn)
        loader = session.segments.begin(segment, samples, training.schedule)
        session.reports.forget_recomputed()
        self._is_training = True
        try:
            yield from training.work.batches(segment, loader)
            self._is_training = False
            model = training.work.replica.model
            if session.context.policy.is_local:
                self._hand_in(constraints.unit_vectors(model))
            session.final_tensors.are(model)
        finally:
            loader.close()

    def log(self, **values: Any) -> None:
        """Report metrics, numbers or one-element tensors. Between a batch and its `step` they join the round's means;
        elsewhere (after an evaluation, say) each call is recorded on its own. The last `accuracy` that is logged there is the
        summary's. Log `held_out` with it, the number of samples that it is over, if nobody trains on these."""
        numbers = {name: float(v.detach() if isinstance(v, torch.Tensor) else v) for name, v in values.items()}
        self._session.log(numbers)

    def before_merge(self, callback: Callable[[], None]) -> None:
        """Call `callback` just before replicas that were trained apart are merged (`local`, `average`)."""
        self._session.merge_hooks.before_merge.append(callback)

    def merge_by(self, evaluate: Callable[[nn.Module], float]) -> None:
        """Have `evaluate(model)`, more is better, choose among replicas that were trained apart, where `merge` is `greedy`.

        It is called on each worker with its replica, and on the chief with means of several: say, accuracy on held-out data. A
        model with batch normalisation needs `recompute_batchnorm` there first, or the means' statistics do not fit.
        """
        self._session.merge_hooks.evaluate = evaluate

    @contextlib.contextmanager
    def masters(self) -> Iterator[None]:
        """Have the servers' own weights in the model while this lasts, for an evaluation: `with run.masters(): ...`.

        They differ from those that the model is trained with where `--compress-weights` rounds these. They are what the model's
        file has. Otherwise this does nothing. Do not train within it. If other workers have ended the round meanwhile, the model
        keeps the weights that it has. After the last round this cannot be.
        """
        training = self._session.training
        weights = training.full_precision() if training is not None else {}
        if training is None or not weights:
            yield
            return
        with training.work.replica.holding(weights):
            yield

    def recompute_batchnorm(self, dataset: Dataset[Any]) -> None:
        """Compute the running statistics of the model's batch normalisation anew, by one pass through training data.

        To be called by every worker when the loop is over, under `local` and `average`: the mean of the replicas' statistics is
        not that of the merged weights. All get the same bits, and so does the model's file. Does nothing where there is no batch
        normalisation.
        """
        if self._model is None:
            raise UsageError("recompute_batchnorm() needs a model: call run.replicate(model) before it.")
        batchnorm.recompute(self._model, dataset, self.settings.global_batch, self.settings.seed)
        if not self._is_training:  # else it is a candidate for a merge that was judged
            found = batchnorm.statistics(self._model)
            self._session.final_tensors.are_also({tensor_names.plain(name): tensor for name, tensor in found.items()})
            self._hand_in(found)

    def _hand_in(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Have tensors that every worker has computed anew, with the same bits, in the model's file as far as it has them."""
        known = {tensor_names.plain(name): tensor for name, tensor in tensors.items() if tensor.numel()}
        training = self._session.training
        in_file = training.setup.in_file if training is not None else set()
        self._session.reports.recomputed(self.round, [name for name in known if name in in_file], known)

    def kv(self) -> KvClient:
        """The key-value client: `push`, `pull` and `wait` with timestamps, for those who write their own loop.

        Raises UsageError where servers are to keep copies, for of keys there are none.
        """
        return self._session.open_kv()

    # ---- the end

    def leave(self) -> None:
        """Leave the run after the micro-batch that is being computed: the script ends there, and others do the rest. Has no
        effect where replicas train apart (`local`, `average`). May be called by a signal's handler."""
        self._session.departure.requested = not self._session.context.policy.is_local

    def on_stop_signal(self, number: int, frame: object = None) -> None:
        """A signal's handler: leave as soon as the coordinator lets this worker, as others do the rest or there is a checkpoint.
        If called again, raise Stopped."""
        self._session.on_stop_signal(number)

    @property
    def left_early(self) -> bool:
        """Whether this worker has stopped training before the run's end, as it was to leave."""
        return self._session.departure.early

    @property
    def stop_signal(self) -> int:
        """The signal that has told this worker to stop; 0 if none has."""
        return self._session.io.stop_signal

    def finish(self) -> None:
        """Leave the run: report what is left, hand in the model if asked to, and wait until the results are saved.

        Called by itself when the script ends. Raises ClusterError if the run failed elsewhere.
        """
        self._session.finish(self.failure, self.interrupted, self.cut_off)

    @property
    def failed_elsewhere(self) -> bool:
        """Whether the coordinator has said that the run has failed."""
        return self._session.io.failed

    # ---- for the parts of this package

    @property
    def traffic(self) -> Traffic:
        """Return how much of this worker's tensors has travelled so far."""
        return self._session.router.traffic
