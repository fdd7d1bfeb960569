"""The choice of the replicas for a greedy merge, on which workers agree through the servers' key-value store.

Every worker puts its weights and their score there. The chief adds replicas to a mean, best first, and announces which ones it
has kept. Then the merge goes on as any other, with a weight of 1 or 0 for each replica. All workers agree even if messages are
repeated, because each push counts once and each worker adds to places of its own. The servers hold all replicas until their
owners know the choice.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence

import torch

from roundtable.common.model.layout import Chunk
from roundtable.common.model.partial_sum import Sum, adder
from roundtable.common.model.tensor_bytes import dtype_of, to_frame
from roundtable.common.runtime.errors import ClusterError
from roundtable.worker.client.context import WorkerContext
from roundtable.worker.client.kv_client import KvClient
from roundtable.worker.merge import constraints
from roundtable.worker.merge.averaging import greedy, mean
from roundtable.worker.replica.replica import Replica

Part = dict[int, torch.Tensor]

#: Seconds between two looks at the other workers' keys.
_LOOK_S = 0.1


class GreedySoup:
    """One worker's part in choosing replicas for a merge (Wortsman et al., "Model soups", ICML 2022)."""

    def __init__(
        self,
        context: WorkerContext,
        kv: KvClient,
        is_chief: bool,
        replica: Replica,
        evaluate: Callable[[], float],
        log: Callable[[dict[str, float]], None],
        merge: int,
    ) -> None:
        """`evaluate` returns the score of the weights in the model now. `merge` is the merge's number."""
        self._context = context
        self._kv = kv
        self._is_chief = is_chief
        self._replica = replica
        self._evaluate = evaluate
        self._log = log
        #: The chunks that were trained.
        self._chunks: list[Chunk] = []
        self._workers = context.settings.workers
        self._began = replica.began()
        #: The key of the workers' scores.
        self._scores = f"merge/{merge}/scores"
        #: The key of the choice, and of the number of means tried so far.
        self._choice = f"merge/{merge}/choice"
        #: The prefix of the keys of the workers' weights.
        self._parts = f"merge/{merge}/part"

    def weight(self, values: Part) -> int:
        """Return 1 if this worker's replica, whose weights by chunk are `values`, is chosen; else 0.

        The chief's model then has the weights of some mean. Raises ClusterError if other workers write nothing for the run's
        time-out.
        """
        me = self._context.index
        self._chunks = chunks = [chunk for chunk in self._replica.layout.chunks if chunk.id in values]
        self._wait([self._kv.push(f"{self._parts}/{me}/{c.id}", values[c.id].to(dtype_of(c.dtype)), "set") for c in chunks])
        self._add(self._choice, _zeros(2 + self._workers))
        score = float(self._evaluate())
        said = _zeros(2 * self._workers)
        said[me], said[self._workers + me] = 1.0, -math.inf if math.isnan(score) else score
        self._add(self._scores, said)
        if self._is_chief:
            self._choose()
        choice = self._look(
            self._choice, 2 + self._workers, lambda seen: bool(seen[0]), lambda seen: "worker-0 to choose replicas"
        )
        self._wait([self._kv.push(f"{self._parts}/{me}/{c.id}", torch.zeros(1), "set") for c in chunks])  # free the memory
        return int(choice[2 + me])

    def _choose(self) -> None:
        count = self._workers
        seen = self._look(
            self._scores, 2 * count, lambda seen: bool(seen[:count].all()), lambda seen: f"the weights of {_absent(seen[:count])}"
        )
        parts: dict[int, Part] = {}

        def score(numbers: Sequence[int]) -> float:
            for number in numbers:
                parts[number] = parts.get(number) or self._pull(number)
            for number in parts.keys() - set(numbers):
                del parts[number]
            merged = self._merged([parts[number] for number in sorted(numbers)])
            self._replica.load({chunk: to_frame(values) for chunk, values in merged.items()})
            constraints.put_back(self._replica.model)
            found = float(self._evaluate())
            self._log({"merge_score": found})
            self._add(self._choice, _at(2 + count, [1]))
            return found

        chosen = greedy(seen[count:].tolist(), score)
        self._log({"merged_parts": float(len(chosen))})
        self._add(self._choice, _at(2 + count, [0, *(2 + number for number in chosen)]))

    def _merged(self, parts: Sequence[Part]) -> Part:
        """Return what servers would merge these replicas to, with a weight of 1 each, in the order of their workers."""
        out = mean(parts, [1.0] * len(parts))
        for chunk in self._chunks:
            each = [part[chunk.id] for part in parts]
            if chunk.kind == "max":
                out[chunk.id] = functools.reduce(torch.maximum, each)
            elif chunk.kind == "sum":
                began = self._began[chunk.id].to(each[0].dtype)
                out[chunk.id] = functools.reduce(torch.add, [values - began for values in each], began)
            elif chunk.kind == "last":
                sums = [Sum(values, self._changed(chunk, values)) for values in each]
                out[chunk.id] = functools.reduce(adder(chunk), sums).values
        return out

    def _changed(self, chunk: Chunk, values: torch.Tensor) -> int:
        """Return the mask of pieces in which a replica's buffers have changed since the round began."""
        began = self._began[chunk.id]
        pieces = [slice(piece.offset, piece.offset + piece.length) for piece in chunk.pieces]
        return sum((not torch.equal(values[at], began[at])) << bit for bit, at in enumerate(pieces))

    def _pull(self, worker: int) -> Part:
        part = {c.id: torch.empty(c.numel, dtype=dtype_of(c.dtype)) for c in self._chunks}
        self._wait([self._kv.pull(f"{self._parts}/{worker}/{chunk}", values) for chunk, values in part.items()])
        return part

    def _add(self, key: str, values: torch.Tensor) -> None:
        self._kv.wait(self._kv.push(key, values))

    def _wait(self, timestamps: Sequence[int]) -> None:
        for timestamp in timestamps:
            self._kv.wait(timestamp)

    def _look(
        self,
        key: str,
        size: int,
        ready: Callable[[torch.Tensor], bool],
        waited_for: Callable[[torch.Tensor], str],
    ) -> torch.Tensor:
        """Read `key` until its value is `ready`, and return the value. Raises ClusterError if it does not change in time."""
        timeout = self._context.settings.progress_timeout
        seen, changed_at = _zeros(size), time.monotonic()
        while not ready(seen):
            now, before = time.monotonic(), seen.clone()
            if now > changed_at + timeout:
                raise ClusterError(f"waited {timeout:.0f} s for {waited_for(seen)}.")
            self._context.wait(lambda: None, lambda: waited_for(seen), every=_LOOK_S)
            self._kv.wait(self._kv.pull(key, seen))
            if not torch.equal(seen, before):
                changed_at = now
        return seen


def _zeros(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.float64)  # float64 has all digits of a score


def _at(size: int, places: Sequence[int]) -> torch.Tensor:
    """Return zeros with a one at each of these places."""
    out = _zeros(size)
    out[list(places)] = 1.0
    return out


def _absent(there: torch.Tensor) -> str:
    return " and ".join(f"worker-{number}" for number, is_there in enumerate(there.tolist()) if not is_there)
