"""Putting the servers' weights into the model, some of them later than others."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
from typing import Any

from roundtable.common.protocol.transport import PATIENCE_BY_WORKER_S
from roundtable.common.runtime.errors import NoAnswer
from roundtable.worker.client.context import WorkerContext
from roundtable.worker.client.push_pull import ParameterClient
from roundtable.worker.loop.throughput import Throughput
from roundtable.worker.replica.lazy_weights import LazyWeights
from roundtable.worker.replica.replica import Replica

#: Least time, in seconds, after which a waiting worker asks for more work.
_PATIENCE_S = 0.05


class _Found(Enum):
    """How a wait for weights ends."""

    #: The weights are here.
    HERE = "here"
    #: The round is over, and its weights are gone.
    GONE = "gone"
    #: There is a micro-batch to compute first.
    WORK = "work"


class WeightFetcher:
    """Pulls weights, and makes the model wait for those that are still to come."""

    def __init__(self, context: WorkerContext, client: ParameterClient, replica: Replica, throughput: Throughput) -> None:
        self._context = context
        self._client = client
        self._replica = replica
        self._throughput = throughput
        self._lazy = LazyWeights(replica, self._await_tensor)
        #: The chunks that are not in the model yet.
        self._to_come: set[int] = set()
        #: Versions, by server, of the weights in the model.
        self.versions: dict[int, int] = {}
        #: Whether some weights of this round never come. Nothing computed in the round is of use then.
        self.round_invalid = False
        #: Seconds that the training thread has waited for weights during a computation.
        self.waited_s = 0.0

    def fetch(
        self,
        round_: int,
        after_all_updates: bool = False,
        lazy: bool = False,
        has_work: Callable[[], bool] | None = None,
        ask_for_work: Callable[[], None] | None = None,
    ) -> int | None:
        """Put the weights that a round starts from into the model, and return that round, or a later one if it is over.

        Return None if `has_work` says that there is a micro-batch to compute first. While this worker waits, it calls
        `ask_for_work` now and then. If `lazy`, some weights may come after the return, but none that the forward needs first.
        Raises NoAnswer.
        """
        client, io = self._client, self._context.io
        if client.for_round != round_:
            with io.lock:
                messages = client.pull(round_, after_all_updates, time.monotonic())
            io.send(*messages)
        lazy = lazy and client.receives
        needed = self._lazy.needed_first if lazy else set()
        io.heartbeat_soon()

        def ready() -> _Found | None:
            if client.over is not None:
                return _Found.GONE
            if client.complete or (lazy and client.usable(needed)):
                return _Found.HERE
            return _Found.WORK if has_work is not None and has_work() else None

        found = self._wait(ready, ask_for_work)
        if found is _Found.WORK:
            return None
        if found is _Found.GONE:  # not lazy, because the weights now may be the last ones
            return self.fetch(client.over or 0, after_all_updates, False, has_work, ask_for_work)
        self._lazy.came(self._load())
        self._lazy.expect(self._to_come)
        return round_

    def _wait(self, ready: Callable[[], _Found | None], ask_for_work: Callable[[], None] | None) -> _Found:
        began, limit_s = time.monotonic(), self._context.timeout_s
        while True:
            by_workers_s = PATIENCE_BY_WORKER_S * self._context.settings.workers
            patience_s = max(_PATIENCE_S, by_workers_s, self._throughput.seconds / 2)
            found = self._context.wait(ready, self._waited_for, every=patience_s)
            if found is not None:
                return found
            if ask_for_work is not None:
                ask_for_work()
            if time.monotonic() - began > limit_s:
                raise NoAnswer(f"waited {time.monotonic() - began:.0f} s for {self._waited_for()}.")

    def _load(self) -> set[int]:
        """Put the weights that have come into the model, and return their chunks."""
        with self._context.io.lock:
            found, self.versions = self._client.take()
            self._to_come = self._client.to_come  # now: chunks that come later are not in the model yet
        self._replica.load(found, copy=False)
        return set(found)

    def _await_tensor(self, index: int) -> None:
        """Wait for the weights of tensor number `index`, because the model is about to use them."""
        self._await_chunks({chunk.id for chunk in self._replica.chunks_of(index)})

    def await_all(self) -> None:
        """Wait for all weights of the round."""
        self._await_chunks({chunk.id for chunk in self._replica.layout.chunks})

    def _await_chunks(self, chunks: set[int]) -> None:
        if not self._lazy.any:
            return
        client, began = self._client, time.monotonic()
        self._context.wait(lambda: client.gone or client.has(chunks), self._waited_for)
        if not client.has(chunks):
            self.round_invalid = True  # any weights will do, because the result is dropped
            self._lazy.give_up()
        else:
            self._lazy.came(self._load())
        self.waited_s += time.monotonic() - began

    def secure(self, round_: int) -> bool:
        """Keep the weights of `round_` as they are in the model, whatever servers do. Return False if some are gone already.

        Servers that share memory may have written newer weights over them before or during the copy. They still had `round_`
        afterwards if they have not.
        """
        self._replica.copy_from_servers()
        client, context = self._client, self._context
        with context.io.lock:
            messages = client.ask_for(round_, time.monotonic())
        context.io.send(*messages)
        context.wait(lambda: client.complete or client.gone, lambda: f"word whether they have the weights of round {round_}")
        if client.complete:
            with context.io.lock:
                client.take()
        else:
            self.round_invalid = True
        return not self.round_invalid

    def _waited_for(self) -> str:
        return f"the weights {self._client.missing_text()}"

    def close(self) -> None:
        """Make the model an ordinary one that waits for nothing."""
        self._lazy.give_up()


def fetch_again(
    context: WorkerContext, client: ParameterClient, version: int, what: str, *, full_precision: bool = False
) -> dict[int, Any] | None:
    """Return the weights of `version` by chunk, even if the model has them. Return None if that round is over.

    With `full_precision` they are those that no codec has rounded. `what` names them if they do not come: ClusterError then.
    """
    with context.io.lock:
        messages = client.pull(version, False, time.monotonic(), full_precision=full_precision)
    context.io.send(*messages)
    context.wait(lambda: client.complete or client.gone, lambda: f"{what} {client.missing_text()}")
    if not client.complete:
        return None
    with context.io.lock:
        weights, _ = client.take()
    return weights
