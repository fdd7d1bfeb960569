"""`Run`: the object that a training script holds. It keeps a replica up to date and pushes contributions.

Everything here happens on the script's own thread. `roundtable.worker.client.io_thread` serves the sockets. The state machines in
`roundtable.worker.loop.task_queue` and `roundtable.worker.client.push_pull` decide what to compute next and what to send again.
Both threads use them under one lock. The parts behind `Run` are in `roundtable.worker.session`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, Unpack

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from roundtable.common.config.batch_plan import Segment
from roundtable.common.config.settings import Settings
from roundtable.common.protocol.messages.session import Traffic
from roundtable.common.runtime.errors import UsageError, at_script_line
from roundtable.worker import tensor_names
from roundtable.worker.client.kv_client import KvClient
from roundtable.worker.data.arguments import BatchArguments, Data, resolve
from roundtable.worker.deciding import Deciding, device_of
from roundtable.worker.merge import batchnorm, constraints
from roundtable.worker.optim.optimizer import Per, Schedule
from roundtable.worker.optim.script_optimizer import Optimizer
from roundtable.worker.preparation import OptimizerCall
from roundtable.worker.replica.buffers import Rules
from roundtable.worker.session.batches import Batches
from roundtable.worker.session.session import Session

M = TypeVar("M", bound=nn.Module)


class Run(Deciding):
    """A script's part in a run. `roundtable.join` makes it."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        context = session.context
        #: The run's settings, from flags or a file.
        self.settings: Settings = context.settings
        #: This worker's number, from 0.
        self.index = context.index
        self.name = context.name
        self._buffer_rules: Rules = {}
        #: Whether a loop over batches is under way, or was left before its end.
        self._is_training = True

    # ---- questions

    @property
    def is_chief(self) -> bool:
        """True on one worker, the one with the lowest number. Use it for work that is needed once, such as evaluation."""
        return self._session.tasks.is_chief

    @property
    def workers(self) -> int:
        """The number of workers that take part now."""
        return len(self._session.tasks.tables[-1].workers)

    @property
    def round(self) -> int:
        """The round of the model's weights. They include all earlier rounds."""
        return self._session.round

    @property
    def epoch(self) -> int:
        """The data epoch that the current round belongs to; after the last round, the number of epochs done."""
        work = self._session.work
        return work.epoch if work is not None else 0

    @property
    def total_rounds(self) -> int:
        """The rounds of the run up to the end of the newest `batches()`. A script that calls it again has more."""
        return self._session.segments.total_rounds

    # ---- setting up

    def replicate(self, model: M, buffers: Rules | None = None) -> M:
        """Make `model` this worker's replica and return it. It gets the run's weights at the first batch and at every round's
        end.

        The first weights are those of the first worker's model at its first `batches()`. Other models keep their own weights
        until their first `batches()`. In a model with row-sparse tables or sharded layers, `optimizer` sends the first weights.
        If the run has weights already, because it was resumed or this worker joins late, `optimizer` puts them into the model.

        From then on, servers hold all parameters, frozen ones too, and a script must not change them: `step` raises UsageError
        and names the parameter. Under `local` and `average`, only frozen parameters must not change. A script may write other
        values and restore the old ones before it continues, but not under `ssp` and `async`. Writes to `parameter.data` are not
        seen, and are lost.

        Each micro-batch starts with the buffers as they were when the round began. Running statistics of normalisation layers
        are averaged over the micro-batches, weighted by samples. Any other buffer gets its value from the last micro-batch, in
        order, that changed it. `buffers` can change this: it maps names, or patterns with `*`, to rules.

        - `mean`, `max`, `last`: the mean, the largest value, or the value of the last micro-batch that changed the buffer.
        - `sum`: the total of what each micro-batch adds, for example to a counter of tokens.
        - `own`: each worker has its own buffer, for example a cache.

        A buffer that is not in the model's file (`persistent=False`) does not travel unless it has a rule. Without one it must
        not change.

        The weight of a trained `nn.Embedding(sparse=True)` is on the servers alone. This worker fetches the rows that a batch
        looks up, and `weight` is an empty tensor of device "meta". `roundtable.embedding` makes a layer that never had memory
        here.

        Convert the model to its dtype before this call. In a model that torch.compile has made, in whole or in part, tensors
        keep their former names. Raises UsageError if it is called twice.
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
        """Set how the weights are updated, and return the optimizer. Servers run the update; under `local` and `average`,
        workers do.

        `cls` is a class of torch.optim, or one that servers can import, and `hyper` its arguments. `params` are parameters or
        groups as torch.optim takes them, by default all of the model's. A group may have a class of its own, under the key
        `optimizer`, and arguments for it.
        `schedule` makes a scheduler of torch.optim.lr_scheduler for the optimizer that it is given, such as
        `schedule=lambda o: StepLR(o, 30)`. The run steps it after every round or epoch, by `schedule_per`. Or
        attach a scheduler to the result, or set numbers in its `param_groups` (docs/tutorial/optimizers.md). As `schedule`,
        ReduceLROnPlateau needs epochs, and gets the epoch's mean of the `loss` that was logged for each batch.
        `clip_norm` bounds the 2-norm of the whole gradient, like torch.nn.utils.clip_grad_norm_. The results have the bits of
        the same class in plain PyTorch. `fused=True` takes torch's fused kernel, which for Adam halves the servers' time.

        Raises UsageError, with the reason, for a class, settings or parameters that cannot be trained in this way.
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
        self._session.look_back()
        return optimizer

    # ---- training

    def batches(self, dataset: Dataset[Any] | DataLoader[Any], **arguments: Unpack[BatchArguments]) -> Batches:
        """Return this worker's micro-batches of passes over a map-style data set, a stream or a DataLoader: loop over them.

        `BatchArguments` has the arguments. The run's settings stand in for sizes and epochs that are left out. Every worker must
        pass the same data and sizes. Batches come on `device` if the model is there. After each batch call `loss.backward()` and
        `opt.step()`; the loss is a mean over the micro-batch. Each loop over the batches is a segment, for example an epoch:
        rounds and epochs continue to count. `len()` is the number of batches that this worker expects of a loop.

        Of a DataLoader all but the order in which it draws is taken over, and its `batch_size` is the micro-batch. The order of
        its sampler is made anew from the run's seed and the epoch.

        Raises UsageError, with the script's line, if workers cannot share the data (a generator) or the order (a sampler that is
        no pure function of seed and epoch). The loop raises it if `step` was not called for a batch.
        """
        segments = self._session.segments
        try:
            data = resolve(dataset, arguments, self._session.context.settings.seed, segments.next_epoch)
            return Batches(data, segments, self._loop)
        except UsageError as error:
            raise at_script_line(error) from None

    def _loop(self, data: Data, segment: Segment) -> Iterator[Any]:
        """Yield this worker's micro-batches of `segment`."""
        session, training = self._session, self._session.training
        if training is None:
            raise UsageError("batches() needs an optimizer: call run.optimizer(...) before it.")
        if session.segments.is_cut_off:
            return
        if session.segments.none:
            training.begin()
        model = training.work.replica.model
        loader = session.segments.begin(segment, data, training.schedule, device_of(model, self.device))
        session.reports.forget_recomputed()
        self._is_training = True
        try:
            yield from training.work.batches(segment, loader)
            self._is_training = False
            if session.context.policy.is_local:
                self._hand_in(constraints.unit_vectors(model))
            session.final_tensors.are(model)
        finally:
            loader.close()

    def log(self, **values: Any) -> None:
        """Report metrics: numbers or one-element tensors.

        Between a batch and its `step`, they join the round's means. Elsewhere, for example after an evaluation, each call is
        recorded on its own. The summary takes the last `accuracy` that is logged there. Log `held_out` with it, the number of
        samples that were measured, if no worker trains on them.
        """
        numbers = {name: float(v.detach() if isinstance(v, torch.Tensor) else v) for name, v in values.items()}
        self._session.log(numbers)

    def before_merge(self, callback: Callable[[], None]) -> None:
        """Call `callback` just before replicas that were trained apart are merged (`local`, `average`)."""
        self._session.merge_hooks.before_merge.append(callback)

    def merge_by(self, evaluate: Callable[[nn.Module], float]) -> None:
        """Choose among replicas that were trained apart by `evaluate(model)`, more is better, if `merge` is `greedy`.

        Each worker calls it with its replica, and the chief also with means of several replicas. It may return the accuracy on
        held-out data. If the model has batch normalisation, `evaluate` must call `recompute_batchnorm` first, because the
        means' statistics do not fit.
        """
        self._session.merge_hooks.evaluate = evaluate

    @contextlib.contextmanager
    def masters(self) -> Iterator[None]:
        """Have the servers' own weights in the model inside the context, for an evaluation: `with run.masters(): ...`.

        These are the weights in the model's file. They differ from the model's only if `--compress-weights` rounds these;
        otherwise the context changes nothing. Do not train inside it. If other workers have ended the round meanwhile, the model
        keeps its weights. After the last round they cannot end it.
        """
        training = self._session.training
        weights = training.full_precision() if training is not None else {}
        if training is None or not weights:
            yield
            return
        with training.work.replica.holding(weights):
            yield

    def recompute_batchnorm(self, dataset: Dataset[Any]) -> None:
        """Compute the running statistics of the model's batch normalisation again, by one pass over training data.

        Every worker must call this after the loop under `local` and `average`, because the mean of the replicas' statistics
        does not fit the merged weights. All workers get the same bits, and so does the model's file. A model without batch
        normalisation is not changed.
        """
        if self._model is None:
            raise UsageError("recompute_batchnorm() needs a model: call run.replicate(model) before it.")
        batchnorm.recompute(self._model, dataset, self.settings.global_batch, self.settings.seed)
        if not self._is_training:  # otherwise the model is a candidate for a merge
            found = batchnorm.statistics(self._model)
            self._session.final_tensors.are_also({tensor_names.plain(name): tensor for name, tensor in found.items()})
            self._hand_in(found)

    def _hand_in(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Report tensors that every worker has computed with the same bits, for the model's file as far as it has them."""
        known = {tensor_names.plain(name): tensor for name, tensor in tensors.items() if tensor.numel()}
        training = self._session.training
        in_file = training.setup.in_file if training is not None else set()
        self._session.reports.recomputed(self.round, [name for name in known if name in in_file], known)

    def kv(self) -> KvClient:
        """Return the key-value client, for scripts with their own loop: `push`, `pull` and `wait` with timestamps.

        Raises UsageError with --replicas, because the key-value store has no backups.
        """
        return self._session.open_kv()

    # ---- the end

    def leave(self) -> None:
        """Leave the run after the current micro-batch. The script ends there, and other workers do the rest.

        Has no effect if replicas train apart (`local`, `average`). A signal's handler may call this.
        """
        self._session.leave()

    def finish(self) -> None:
        """Leave the run: send the last reports and pushes, and wait until the run's results are saved.

        The end of the script calls this, and so does `roundtable.join()` in a notebook. Raises ClusterError if the run failed
        elsewhere.
        """
        self._session.finish()

    @property
    def traffic(self) -> Traffic:
        """This worker's traffic so far."""
        return self._session.router.traffic
