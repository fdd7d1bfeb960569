"""Makes the parts of a training, and agrees on them with the servers and the coordinator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from roundtable.common.protocol.messages.embedding import RowAck, Rows
from roundtable.common.protocol.messages.sharded import LayerAck, ShardedForwardReply
from roundtable.common.protocol.shared_memory import Handle
from roundtable.common.protocol.transport import new_incarnation
from roundtable.common.runtime.errors import UsageError
from roundtable.common.runtime.skip_dynamo import no_compiler
from roundtable.worker.client.context import WorkerContext
from roundtable.worker.client.push_pull import ParameterClient
from roundtable.worker.layers.sharded_linear import Sharded, ShardedLayers
from roundtable.worker.layers.sparse_embedding import RowSparse, SparseEmbedding
from roundtable.worker.loop.contributor import Contributor
from roundtable.worker.loop.departure import Departure
from roundtable.worker.loop.gradient_loop import GradientLoop
from roundtable.worker.loop.local_sgd import LocalSgdLoop, MergeHooks
from roundtable.worker.loop.task_queue import TaskQueue
from roundtable.worker.model_setup import ModelSetup, SharedMemorySetup
from roundtable.worker.optim.inner_optimizer import InnerOptimizer
from roundtable.worker.optim.optimizer import NO_LOSS, Hypers
from roundtable.worker.optim.round_settings import RoundSettings
from roundtable.worker.optim.script_optimizer import Optimizer
from roundtable.worker.preparation import OptimizerCall, Preparation, prepare
from roundtable.worker.replica.buffers import Rules
from roundtable.worker.replica.gradient_buffers import GradientBuffers
from roundtable.worker.replica.replica import Replica
from roundtable.worker.router import MessageRouter
from roundtable.worker.session.training import Training
from roundtable.worker.together.epoch_metrics import EpochMetrics


class Assembly:
    """Assembles a training from the parts of a worker."""

    def __init__(
        self,
        context: WorkerContext,
        router: MessageRouter,
        tasks: TaskQueue,
        departure: Departure,
        merge_hooks: MergeHooks,
        metrics: EpochMetrics,
        servers: int,
        rounds: tuple[Callable[[], int], Callable[[], int]],
    ) -> None:
        """`rounds`: return the round of the model's weights, and the round of the micro-batch that is computed now."""
        self._context, self._router, self._tasks = context, router, tasks
        self._departure, self._merge_hooks, self._servers = departure, merge_hooks, servers
        self._metrics = metrics
        self._round, self._computed = rounds

    def assemble(
        self, model: nn.Module, rules: Rules, params: Iterable[Any] | None, call: OptimizerCall
    ) -> tuple[Training, Optimizer]:
        """Return the training of a model, and the optimizer for the script.

        Raises UsageError if it cannot be trained this way.
        """
        policy = self._context.policy
        made = prepare(model, rules, params, call, policy, self._servers)
        setup = ModelSetup(self._context, made.replica, made.update, made.tables, made.layers, made.facts, self._servers)
        client = self._client_of(made.replica)
        sends_first = setup.agree()
        rows, shards = self._clients_of_layers(made.tables, made.layers, sends_first)
        settings = self._settings(made, call, client)
        work = self._loop(made, call, client, rows, shards, settings)
        training = Training(self._context, setup, client, work, made.schedule)
        is_dense = not (made.tables or made.layers)
        return training, Optimizer(work.step, settings, made.optimizer.defaults, [rows.forget, shards.forget], is_dense)

    def _settings(self, made: Preparation, call: OptimizerCall, client: ParameterClient) -> RoundSettings:
        """Return the settings of the rounds."""
        if isinstance(made.optimizer, InnerOptimizer):
            return made.optimizer.settings
        with no_compiler():
            hypers = Hypers(made.optimizer, call.schedule, call.schedule_per, self._epoch_loss)
        groups = [{**shown, "params": own["params"]} for shown, own in zip(made.optimizer.param_groups, made.dense, strict=True)]
        settings = RoundSettings(groups, hypers)
        settings.told = lambda: client.settings
        return settings

    def _loop(
        self,
        made: Preparation,
        call: OptimizerCall,
        client: ParameterClient,
        rows: RowSparse,
        shards: ShardedLayers,
        settings: RoundSettings,
    ) -> GradientLoop | LocalSgdLoop:
        replica = made.replica
        if isinstance(made.optimizer, InnerOptimizer):
            self._share(client, replica, None)
            return LocalSgdLoop(self._context, client, self._tasks, self._departure, replica, made.optimizer, self._merge_hooks)
        own_clip = call.clip_norm if self._context.policy.applies == "push" else None
        buffers = GradientBuffers(replica.layout, shared=self._context.settings.transport == "auto")
        self._share(client, replica, buffers.handle)
        contributor = Contributor(self._context, client, self._tasks, replica, rows, shards, buffers, settings, own_clip)
        return GradientLoop(self._context, client, self._tasks, self._departure, replica, rows, shards, contributor, settings)

    def _client_of(self, replica: Replica) -> ParameterClient:
        """Return the client of the servers that hold the model's weights."""
        context = self._context
        with context.io.lock:
            near = [server for server in range(self._servers) if context.io.connections.is_near(server)]
            client = ParameterClient(replica.layout, context.settings, context.policy.applies == "push", near)
            self._router.add(client, client.handle)
        return client

    def _clients_of_layers(
        self, tables: Sequence[SparseEmbedding], layers: Sequence[Sharded], sends_first: bool
    ) -> tuple[RowSparse, ShardedLayers]:
        """Let the servers compute sparse embeddings and sharded layers from now on, and return the clients' owners."""
        io, timeout, replicas = self._context.io, self._context.timeout_s, self._context.settings.replicas > 0
        rows = RowSparse(io, tables, self._servers, self._round, timeout, sends_first, replicas)
        shards = ShardedLayers(
            io, layers, self._servers, self._computed, timeout, new_incarnation(), len(tables), sends_first, replicas
        )
        with io.lock:
            self._router.add(rows.client, rows.client.handle, Rows, RowAck)
            self._router.add(shards.client, shards.client.handle, ShardedForwardReply, LayerAck)
        return rows, shards

    def _share(self, client: ParameterClient, replica: Replica, gradients: Handle | None) -> None:
        """Share memory with the servers on this host, if the run allows it."""
        if self._context.settings.transport == "auto":
            memory = SharedMemorySetup(self._context, client, replica, gradients)
            self._router.share_memory(memory.hear)
            memory.agree()

    def _epoch_loss(self, epoch: int) -> float | None:
        """Return the mean of the logged loss over a data epoch.

        Return None if pushes are applied at once and some worker has not finished the data epoch. Raises UsageError if no loss
        was logged.
        """
        answer = self._metrics.mean(epoch, "loss", waits=self._context.policy.applies == "round")
        if answer.complete and answer.value is None:
            raise UsageError(NO_LOSS)
        return answer.value if answer.complete else None
