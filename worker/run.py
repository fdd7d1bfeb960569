"""`Run`: what a training script holds. It joins the cluster, keeps a replica up to date and hands in its contributions.

Everything here happens on the script's own thread; sockets are served by `roundtable.worker.client.io_thread`, and what to
compute next and what to send again is decided by the state machines in `roundtable.worker.loop.task_queue` and
`roundtable.worker.client.push_pull`, which both threads use under one lock.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from torch import nn
from torch.utils.data import Dataset

from roundtable.common.config.batch_plan import Segment, Task, derive_seed, make_segment
from roundtable.common.config.settings import Settings
from roundtable.common.config.worker_facts import Fact
from roundtable.common.policies import load
from roundtable.common.protocol.effects import COORDINATOR, Send
from roundtable.common.protocol.messages.commit import Mean
from roundtable.common.protocol.messages.embedding import RowAck, Rows
from roundtable.common.protocol.messages.session import Goodbye, Heartbeat, Traffic
from roundtable.common.protocol.messages.setup import (
    Plan,
    PlanReply,
    Request,
)
from roundtable.common.protocol.messages.sharded import LayerAck, ShardedForwardReply
from roundtable.common.protocol.shared_memory import Handle
from roundtable.common.protocol.transport import new_incarnation
from roundtable.common.runtime.errors import Stopped, UsageError
from roundtable.common.runtime.failpoints import arm
from roundtable.common.runtime.skip_dynamo import no_compiler
from roundtable.common.runtime.watchdog import Watchdog
from roundtable.worker import facts as alike
from roundtable.worker import tensor_names
from roundtable.worker.client.context import WorkerContext
from roundtable.worker.client.io_thread import IoThread
from roundtable.worker.client.kv_client import KvClient
from roundtable.worker.client.push_pull import ParameterClient
from roundtable.worker.data.loader import Loader, dataset_size, seed_everything
from roundtable.worker.layers.sharded_linear import Sharded, ShardedLayers
from roundtable.worker.layers.sparse_embedding import RowSparse, SparseEmbedding
from roundtable.worker.loop import local_sgd
from roundtable.worker.loop.departure import Departure
from roundtable.worker.loop.gradient_loop import GradientLoop
from roundtable.worker.loop.task_queue import TaskQueue
from roundtable.worker.merge import batchnorm, constraints
from roundtable.worker.model_setup import ModelSetup, SharedMemorySetup
from roundtable.worker.optim.optimizer import (
    NO_LOSS,
    Hypers,
    Optimizer,
    Per,
    Schedule,
    silence_scheduler_warnings,
)
from roundtable.worker.preparation import OptimizerCall, prepare
from roundtable.worker.replica.buffers import Rules
from roundtable.worker.replica.gradient_buffers import GradientBuffers
from roundtable.worker.replica.replica import Replica
from roundtable.worker.reports import ReportQueue
from roundtable.worker.router import MessageRouter

log = logging.getLogger("roundtable.worker.run")

#: Seconds that one who leaves waits for servers to have what it has sent.
_HAND_OVER_S = 10.0
#: Tensors that a script has changed after the last round, of which the coordinator is told at most.
_MOST_CHANGED = 100
#: The thing that a worker waits for once its script has ended.
_END = "the coordinator to end the run, which others may still compute"
#: Seconds after which the mean loss of an epoch is asked for again.
_MEAN_AGAIN_S = 0.1

M = TypeVar("M", bound=nn.Module)


class Run:
    """A script's part in a run. Made by `roundtable.join`."""

    def __init__(self, link: IoThread) -> None:
        self._link = link
        welcome = link.joined()
        #: The run's settings, from flags or a file.
        self.settings: Settings = welcome.settings
        #: This worker's number, from 0.
        self.index = int(welcome.process.rpartition("-")[2])
        self.name = welcome.process
        #: The device that tensors of the training loop belong on.
        self.device = (
            torch.device("cuda", self.index % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
        )
        self._policy = load(self.settings)
        self._context = WorkerContext(self.name, self.index, self.settings, self._policy, link)
        self._departure = Departure()
        self._reports = ReportQueue(link)
        self._merge_hooks = local_sgd.MergeHooks([], self.kv, lambda values: self.log(**values))
        self._tasks = TaskQueue(self.name, welcome.share_tables)
        self._router = MessageRouter(link, self._tasks, self._reports, self._may_leave)
        self._servers = len(welcome.servers)
        self._model: nn.Module | None = None
        self._buffer_rules: Rules = {}
        #: The facts of the schedule that the coordinator gets, and the data set whose samples it has got.
        self._schedule: alike.ScheduleFacts | None = None
        self._told_of: object = None
        self._work: GradientLoop | local_sgd.LocalSgdLoop | None = None
        self._exchange: ParameterClient | None = None
        self._kv: KvClient | None = None
        #: None before the script has made its optimizer.
        self._model_setup: ModelSetup | None = None
        self._segments: list[Segment] = []
        #: Whether a loop over batches goes on, or was left before its end.
        self._is_training = True
        #: How often each tensor of the model had been written to when the last loop over batches had ended.
        self._written: dict[str, tuple[torch.Tensor, int]] = {}
        self._finished = False
        #: Whether the script was interrupted, so that what it was at is given up.
        self.interrupted = False
        self._pid = os.getpid()
        #: Why the script failed, if it did: told to the coordinator in `finish`.
        self.failure = ""
        #: Whether that was for a server that did not answer.
        self.cut_off = False
        arm(self.name, Path(welcome.run_dir))
        with link.lock:
            link.epoch = welcome.share_tables[-1].epoch
            link.on_message = self._router.handle
            link.on_replaced = self._router.replaced
            link.on_tick = self._router.tick
            link.beat = self._beat
        torch.set_num_threads(self.settings.threads)
        seed = derive_seed(self.settings.seed, "model")
        torch.manual_seed(seed)  # also what is not in use yet
        seed_everything(seed)
        silence_scheduler_warnings()
        self._watchdog = Watchdog(self.settings.stack_dump_after, self._progress, lambda: link.waits_for or "its own script")

    # ---- what a script may ask

    @property
    def is_chief(self) -> bool:
        """True on one worker, the one with the lowest number: for what needs doing once, such as evaluation."""
        return self._tasks.is_chief

    @property
    def workers(self) -> int:
        """Workers that take part now."""
        return len(self._tasks.tables[-1].workers)

    @property
    def round(self) -> int:
        """Rounds before this one are in the weights of the model."""
        return self._work.round if self._work is not None else 0

    @property
    def _computed(self) -> int:
        """The round of the micro-batch that is computed now; where there is none, `round`."""
        task = self._work.batch.task if self._work is not None else None
        return task.round if task is not None else self.round

    @property
    def epoch(self) -> int:
        """The epoch that the current round belongs to; after the last round, the number of epochs done."""
        return self._work.epoch if self._work is not None else 0

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
        if self._work is not None:
            raise UsageError("optimizer() was called twice; a run has one optimizer, which may have several groups.")
        call = OptimizerCall(cls, hyper, schedule, schedule_per, clip_norm)
        made = prepare(self._model, self._buffer_rules, params, call, self._policy, self._servers)
        self._schedule, replica = made.schedule, made.replica
        setup = self._model_setup = ModelSetup(
            self._context, replica, made.update, made.tables, made.layers, made.facts, self._servers
        )
        client = self._client_of(replica)
        sends_first = setup.agree()
        rows, shards = self._clients_of_layers(made.tables, made.layers, sends_first)
        work: GradientLoop | local_sgd.LocalSgdLoop
        if isinstance(made.optimizer, local_sgd.Inner):
            self._share(client, replica, None)
            work = local_sgd.LocalSgdLoop(self._context, client, self._tasks, replica, made.optimizer, self._merge_hooks)
        else:
            own_clip = clip_norm if self._policy.applies == "push" else None
            with no_compiler():
                hypers = Hypers(made.optimizer, schedule, schedule_per, self._epoch_loss)
            buffers = GradientBuffers(replica.layout, shared=self.settings.transport == "auto")
            self._share(client, replica, buffers.handle)
            work = GradientLoop(
                self._context, client, self._tasks, self._departure,
                replica, rows, shards, buffers, hypers, own_clip,
            )  # fmt: skip
        self._work = work
        if not setup.begins_later:
            work.join()
        return Optimizer(work.step, made.dense, [rows.forget, shards.forget])

    def _client_of(self, replica: Replica) -> ParameterClient:
        """Make the client of the servers that have the model's weights."""
        with self._link.lock:
            near = [server for server in range(self._servers) if self._link.is_near(server)]
            client = ParameterClient(replica.layout, self.settings, self._policy.applies == "push", near)
            self._router.add(client, client.handle)
        self._exchange = client
        return client

    def _clients_of_layers(
        self, tables: Sequence[SparseEmbedding], layers: Sequence[Sharded], sends_first: bool
    ) -> tuple[RowSparse, ShardedLayers]:
        """Have sparse embeddings and sharded layers computed with the servers from now on."""
        timeout, replicas = self._context.timeout_s, self.settings.replicas > 0
        rows = RowSparse(self._link, tables, self._servers, lambda: self.round, timeout, sends_first, replicas)
        shards = ShardedLayers(
            self._link, layers, self._servers, lambda: self._computed, timeout, new_incarnation(), len(tables),
            sends_first, replicas,
        )  # fmt: skip
        with self._link.lock:
            self._router.add(rows.exchange, rows.exchange.handle, Rows, RowAck)
            self._router.add(shards.exchange, shards.exchange.handle, ShardedForwardReply, LayerAck)
        return rows, shards

    def _share(self, client: ParameterClient, replica: Replica, gradients: Handle | None) -> None:
        """Share memory with the servers that can, if the run allows it."""
        if self.settings.transport == "auto":
            memory = SharedMemorySetup(self._context, client, replica, gradients)
            self._router.share_memory(memory.hear)
            memory.agree()

    def _begin(self) -> None:
        """Have the run's weights in the model. If the run begins, those that it has here are the first ones."""
        work, exchange, setup = self._work, self._exchange, self._model_setup
        assert work is not None and exchange is not None and setup is not None
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
            log.warning("%s, but the run has weights already: they are put back.", changed)
            exchange.want_all()
        work.join()

    def _epoch_loss(self, epoch: int) -> float | None:
        """The mean of the logged loss over an epoch; None where pushes are applied at once and it is not over everywhere."""
        waits = self._policy.applies == "round"
        answer = self._link.request(
            COORDINATOR,
            Mean(epoch, "loss"),
            lambda body: isinstance(body, Mean) and body.epoch == epoch and (body.complete or not waits),
            self.settings.progress_timeout,
            again=_MEAN_AGAIN_S,
        )
        assert isinstance(answer, Mean)
        if answer.complete and answer.value is None:
            raise UsageError(NO_LOSS)
        return answer.value if answer.complete else None

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
        if self._work is None:
            raise UsageError("batches() needs an optimizer: call run.optimizer(...) before it.")
        if self._segments and self.round < self._segments[-1].end:
            raise UsageError(
                f"the last loop over batches() was left in round {self.round} of {self._segments[-1].end}: it must go on to its "
                "end, which epochs and --rounds set."
            )
        settings = self.settings
        micro, whole = micro_batch or settings.micro_batch, global_batch or settings.global_batch
        if micro > whole:
            raise UsageError(f"micro_batch is {micro} but global_batch is only {whole}: make it no larger.")
        segment = make_segment(
            before=self._segments[-1] if self._segments else None,
            samples=dataset_size(dataset),
            global_batch=whole,
            micro_batch=micro,
            epochs=epochs or settings.epochs,
            round_limit=settings.rounds,
        )
        if not self._segments:
            self._begin()
        self._segments.append(segment)
        plan = Plan(segment, facts=self._facts_of(segment, dataset, shuffle, num_workers, collate_fn))
        for name in [COORDINATOR, *(f"server-{number}" for number in range(self._servers))]:
            ready = self._context.request(name, plan, lambda b: isinstance(b, PlanReply) and b.segment == segment.index)
            if name == COORDINATOR and isinstance(ready, PlanReply):
                plan = Plan(segment, ready.seal)
        loader = Loader(
            dataset,
            segment,
            settings.seed,
            shuffle=shuffle,
            num_workers=num_workers if self.round < segment.end else 0,  # it may have joined later
            collate_fn=collate_fn,
            forecast=lambda: self._forecast(segment),
        )
        self._reports.forget_recomputed()
        self._is_training = True
        try:
            yield from self._work.batches(segment, loader)
            self._is_training = False
            if self._policy.is_local:
                self._hand_in(constraints.unit_vectors(self._work.replica.model))
            self._written = {name: (tensor, tensor._version) for name, tensor in self._tensors().items()}
        finally:
            loader.close()

    def _facts_of(
        self,
        segment: Segment,
        dataset: Dataset[Any],
        shuffle: bool,
        num_workers: int,
        collate_fn: Callable[[list[Any]], Any] | None,
    ) -> list[Fact]:
        """What all workers must have in common in a segment."""
        facts = [
            alike.setting("shuffle", shuffle),
            alike.setting("the data set", alike.called(type(dataset))),
            alike.setting("collate_fn", alike.called(collate_fn) if collate_fn is not None else "none"),
        ]
        if dataset is not self._told_of:
            self._told_of = dataset
            facts += alike.sample_facts(dataset, self.settings.seed, segment.first_epoch, segment.samples, not num_workers)
        return facts + (self._schedule.of(segment) if self._schedule is not None else [])

    def _forecast(self, segment: Segment) -> Iterator[Task]:
        round_ = segment.first_round
        while round_ < segment.end:
            round_ = max(round_, self.round)
            if round_ >= segment.end:
                return
            with self._link.lock:
                tasks = self._tasks.expected(round_, segment.round(round_).micro_batches)
            yield from tasks
            round_ += 1

    def log(self, **values: Any) -> None:
        """Report metrics, numbers or one-element tensors. Between a batch and its `step` they join the round's means;
        elsewhere (after an evaluation, say) each call is recorded on its own. The last `accuracy` that is logged there is the
        summary's. Log `held_out` with it, the number of samples that it is over, if nobody trains on these."""
        numbers = {name: float(v.detach() if isinstance(v, torch.Tensor) else v) for name, v in values.items()}
        if self._work is not None and self._work.batch.log(numbers):
            return
        self._reports.metrics(self.round, numbers)

    def before_merge(self, callback: Callable[[], None]) -> None:
        """Call `callback` just before replicas that were trained apart are merged (`local`, `average`)."""
        self._merge_hooks.before_merge.append(callback)

    def merge_by(self, evaluate: Callable[[nn.Module], float]) -> None:
        """Have `evaluate(model)`, more is better, choose among replicas that were trained apart, where `merge` is `greedy`.

        It is called on each worker with its replica, and on the chief with means of several: say, accuracy on held-out data. A
        model with batch normalisation needs `recompute_batchnorm` there first, or the means' statistics do not fit.
        """
        self._merge_hooks.evaluate = evaluate

    @contextlib.contextmanager
    def masters(self) -> Iterator[None]:
        """Have the servers' own weights in the model while this lasts, for an evaluation: `with run.masters(): ...`.

        They differ from those that the model is trained with where `--compress-weights` rounds these. They are what the model's
        file has. Otherwise this does nothing. Do not train within it. If other workers have ended the round meanwhile, the model
        keeps the weights that it has. After the last round this cannot be.
        """
        weights = self._masters()
        if not weights or self._work is None:
            yield
            return
        with self._work.replica.holding(weights):
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
            self._written |= {tensor_names.plain(name): (tensor, tensor._version) for name, tensor in found.items()}
            self._hand_in(found)

    def _hand_in(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Have tensors that every worker has computed anew, with the same bits, in the model's file as far as it has them."""
        known = {tensor_names.plain(name): tensor for name, tensor in tensors.items() if tensor.numel()}
        in_file = self._model_setup.in_file if self._model_setup is not None else set()
        self._reports.recomputed(self.round, [name for name in known if name in in_file], known)

    def kv(self) -> KvClient:
        """The key-value client: `push`, `pull` and `wait` with timestamps, for those who write their own loop.

        Raises UsageError where servers are to keep copies, for of keys there are none.
        """
        if self.settings.replicas:
            raise UsageError("the key-value store is on one server each, of which no copies are kept: leave out --replicas.")
        if self._kv is None:
            self._kv = KvClient(self._link, self._servers, self.settings.progress_timeout)
        return self._kv

    # ---- the end

    def leave(self) -> None:
        """Leave the run after the micro-batch that is being computed: the script ends there, and others do the rest. Has no
        effect where replicas train apart (`local`, `average`). May be called by a signal's handler."""
        self._departure.requested = not self._policy.is_local

    def told_to_stop(self, number: int, frame: object = None) -> None:
        """A signal's handler: leave as soon as the coordinator lets this worker, as others do the rest or there is a snapshot.
        If called again, raise Stopped."""
        if os.getpid() != self._pid:  # a process that the script has made of this one
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif self._link.told and not self._finished:
            raise Stopped(number)
        elif not self._link.told:
            self._link.told, self._link.told_at = number, time.monotonic()

    def _may_leave(self) -> None:
        """The coordinator lets this worker go, which was told to stop. Between two micro-batches it hands over what it has;
        where it is at something else of its script, there is nothing to be handed over."""
        self._departure.requested = True
        if not self._segments or self.round >= self._segments[-1].end:
            self._link.interrupt()

    @property
    def left_early(self) -> bool:
        """Whether this worker has stopped training before the run's end, as it was to leave."""
        return self._departure.early

    @property
    def told(self) -> int:
        """The signal that has told this worker to stop; 0 if none has."""
        return self._link.told

    def finish(self) -> None:
        """Leave the run: report what is left, hand in the model if asked to, and wait until the results are saved.

        Called by itself when the script ends. Raises ClusterError if the run failed elsewhere.
        """
        if self._finished:
            return
        self._finished = self._link.copies = True
        try:
            if self.failure or self.interrupted:
                goodbye = Goodbye(
                    self.failure, self.interrupted, cut_off=self.cut_off, used_kv=self._kv is not None, round=self.round
                )
                self._link.send(Send(COORDINATOR, goodbye))
                self._link.wait(lambda: self._link.stopped, 2.0, lambda: "", every=1.0)
                return
            if self._model_setup is not None and self._model_setup.begins_later:
                self._begin()
            self._await_reports()
            changed = self._changed()
            while not self._link.stopped:
                goodbye = Goodbye(early=self._departure.early or self._link.told > 0, round=self.round, changed=changed)
                self._link.send(Send(COORDINATOR, self._beat()), Send(COORDINATOR, goodbye))  # first, the last of what was sent
                self._link.wait(lambda: self._link.stopped, float("inf"), lambda: _END, every=1.0)
        finally:
            self._watchdog.stop()
            self._link.close()
            self._release_model()

    def _await_reports(self) -> None:
        """Wait until the coordinator has all reports and the servers have all pushes."""
        wait, reports = self._context.wait, self._reports
        wait(lambda: reports.has_all(Request.METRICS), lambda: f"the coordinator to record {reports.metrics_text()}")
        statistics = "the coordinator to write the statistics that were computed anew"
        wait(lambda: reports.has_all(Request.RECOMPUTED), lambda: statistics)
        wait(lambda: self._router.idle, lambda: "the servers to have all that was pushed", every=_HAND_OVER_S)

    def _release_model(self) -> None:
        """Make the model an ordinary one: after a run that has failed, weights that it still waits for never come."""
        if self._work is not None:
            self._work.close()

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers of the model, by name."""
        return (
            dict([*tensor_names.parameters(self._model), *tensor_names.buffers(self._model)]) if self._model is not None else {}
        )

    def _changed(self) -> list[str]:
        """Tensors of the model that the script has changed since its last loop over batches ended; some, if they are many."""
        now = self._tensors()
        changed = [name for name, (was, version) in self._written.items() if now.get(name) is not was or was._version != version]
        return changed[:_MOST_CHANGED]

    def _masters(self) -> dict[int, Any]:
        """The servers' own weights for the round that the model is in, by chunk. None if no codec rounds what the model has, or
        the round is over."""
        exchange, work = self._exchange, self._work
        if self.settings.compress_weights == "none" or exchange is None or not isinstance(work, GradientLoop):
            return {}
        clock = work.version()
        if clock is None:
            return {}
        with self._link.lock:
            messages = exchange.pull(clock, False, time.monotonic(), masters=True)
        self._link.send(*messages)
        self._context.wait(lambda: exchange.complete or exchange.gone, lambda: f"the trained weights {exchange.missing_text()}")
        if not exchange.complete:
            return {}
        with self._link.lock:
            weights, _ = exchange.take()
        return weights

    @property
    def failed_elsewhere(self) -> bool:
        """Whether the coordinator has said that the run has failed."""
        return self._link.failed

    # ---- for the parts of this package

    def _progress(self) -> tuple[int, int, int] | None:
        """Return numbers that change while this worker gets on. The watchdog's thread calls it."""
        with self._link.lock:
            beat = self._beat()
        return (beat.round, beat.micro_batch + beat.progress, self._link.answers) if beat.state != "done" else None

    @property
    def traffic(self) -> Traffic:
        """Return how much of this worker's tensors has travelled so far."""
        return self._router.traffic

    def _beat(self) -> Heartbeat:
        traffic = self.traffic
        if self._finished:
            unsteady = self._work.beat().unsteady if self._work is not None else ""
            return Heartbeat("done", self.round, traffic=traffic, unsteady=unsteady)
        if self._work is not None:
            return msgspec.structs.replace(self._work.beat(), traffic=traffic)
        return Heartbeat("starting") if self._kv is None else Heartbeat("computing", progress=self._kv.answered)
