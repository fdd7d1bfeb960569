"""Agreement with the coordinator and the servers on the model, and on the worker whose weights are the first ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import msgspec

from roundtable.common.config.worker_facts import Fact
from roundtable.common.model.layout import message_batches
from roundtable.common.protocol.effects import COORDINATOR, number_of
from roundtable.common.protocol.messages.setup import (
    InitialWeights,
    OfferSharedMemory,
    Request,
    Setup,
    SetupReply,
    SharedMemoryReply,
    Update,
)
from roundtable.common.protocol.session import TELL_S
from roundtable.common.protocol.shared_memory import Handle, NotShared
from roundtable.common.runtime.errors import ClusterError
from roundtable.worker import facts as alike
from roundtable.worker.client.context import WorkerContext, is_accepted
from roundtable.worker.client.push_pull import ParameterClient
from roundtable.worker.layers.sharded_linear import Sharded
from roundtable.worker.layers.sparse_embedding import SparseEmbedding
from roundtable.worker.model_contents import file_of
from roundtable.worker.replica.replica import Replica

log = logging.getLogger("roundtable.worker.run")

#: Seconds between two questions whether servers have the first weights: the first wait, and the longest.
_FIRST_WEIGHTS_S = (0.1, 1.0)


class ModelSetup:
    """Describes one worker's model to the coordinator and the servers, and sends its weights if they are the first ones."""

    def __init__(
        self,
        context: WorkerContext,
        replica: Replica,
        update: Update,
        tables: Sequence[SparseEmbedding],
        layers: Sequence[Sharded],
        facts: Sequence[Fact],
        servers: int,
    ) -> None:
        """`facts` are the script's settings of the optimizer that `update` does not have."""
        self._context = context
        self._replica = replica
        self._servers = [f"server-{number}" for number in range(servers)]
        weights = [table.module.weight for table in tables] + [sharded.layer.weight for sharded in layers]
        biases = [sharded.layer.bias for sharded in layers]
        file = file_of(replica.model, [*replica.tensors, *weights, *biases], replica.specs)
        #: Names of tensors in the model's file.
        self.in_file = {entry.name for entry in file}
        self._setup = Setup(replica.specs, update, replica.layout.tables, replica.layout.sharded_layers, file)
        facts = [*facts, *alike.constant_facts(replica.constants)]
        self._for_coordinator = msgspec.structs.replace(self._setup, facts=facts)
        #: Whether the servers had no weights when this worker came, and whether first weights are sent only with the first batch.
        self.begins = self.begins_later = False
        self._has_own_layers = bool(tables or layers)

    def agree(self) -> bool:
        """Describe the model to all processes, and return whether this worker has sent the first weights."""
        self._tell(COORDINATOR, self._for_coordinator)
        self.begins = any([self._tell(server, self._setup).needs_weights for server in self._servers])
        self.begins_later = self.begins and not self._has_own_layers
        return not self.begins_later and self.send_first_weights()

    def send_first_weights(self) -> bool:
        """Make sure that servers have first weights. Send this worker's if it is the first one, and return whether it is."""
        replica, is_first = self._replica, self._sends_first()
        if is_first:
            replica.check_dtypes()
            size = {chunk.id: chunk.weight_bytes for chunk in replica.layout.chunks}
            for number, server in enumerate(self._servers):
                ids = [chunk.id for chunk in replica.layout.on(number)]
                for batch in message_batches(ids, size.__getitem__):
                    frames = [replica.first_weights(i) for i in batch]
                    answers = is_accepted(Request.INITIAL_WEIGHTS, batch[0])
                    self._context.request(server, InitialWeights(batch), answers, frames)
        self.begins_later = False
        return is_first

    def _sends_first(self) -> bool:
        """Return whether this worker must send first weights. If another worker must, wait until it has.

        The longest wait is the time that all workers may take to join. Raises ClusterError after that.
        """
        began = told_at = time.monotonic()
        patience_s = self._context.settings.start_timeout
        lacking, pause_s = self._servers, _FIRST_WEIGHTS_S[0]
        while True:
            told = self._tell(COORDINATOR, self._for_coordinator)
            lacking = [server for server in lacking if self._tell(server, self._setup).needs_weights]
            if told.needs_weights or not lacking:
                return bool(lacking)
            missing = f"{told.first or 'the first worker'}, whose weights are the first ones, has not come to its first batch"
            if (now := time.monotonic()) > began + patience_s:
                raise ClusterError(f"{missing} in {patience_s:g} s (--start-timeout).")
            if now > told_at + TELL_S:
                told_at = now
                log.info("waits: %s for %.0f s", missing, now - began)
            self._context.wait(lambda: None, lambda: "", every=pause_s)
            pause_s = min(2 * pause_s, _FIRST_WEIGHTS_S[1])

    def _tell(self, name: str, setup: Setup) -> SetupReply:
        answer = self._context.request(name, setup, lambda body: isinstance(body, SetupReply))
        assert isinstance(answer, SetupReply)
        return answer


class SharedMemorySetup:
    """Finds out with which servers this worker shares memory. Both sides must see the same memory."""

    def __init__(self, context: WorkerContext, client: ParameterClient, replica: Replica, gradients: Handle | None) -> None:
        """`gradients` is the place of this worker's gradient buffers, if they are shared."""
        self._context = context
        self._client = client
        self._replica = replica
        self._offer = OfferSharedMemory(gradients)

    def agree(self) -> None:
        """Offer shared memory to all servers, and take their answers."""
        client = self._client
        client.peers.offer = self._offer
        for server in self._replica.layout.owners():
            answer = self._context.request(f"server-{server}", self._offer, lambda body: isinstance(body, SharedMemoryReply))
            assert isinstance(answer, SharedMemoryReply)
            with self._context.io.lock:
                self._meet(server, answer)
        names = [f"server-{server}" for server in sorted(client.peers.readers | client.peers.readable)]
        if names:
            log.info("using shared memory with %s", ", ".join(names))

    def hear(self, sender: str, reply: SharedMemoryReply) -> None:
        """Take the answer of a server that is a new process, if it was asked. The I/O thread calls this."""
        server = number_of(sender)
        if server in self._client.peers.unanswered:
            self._meet(server, reply)

    def _meet(self, server: int, reply: SharedMemoryReply) -> None:
        region = None
        if reply.weights is not None:
            try:
                region = self._replica.mapped.attach(server, reply.weights)
            except NotShared as error:
                log.info("server-%d sends its weights over TCP: %s", server, error)
        self._client.on_shared_memory(server, reply.reads, region)
