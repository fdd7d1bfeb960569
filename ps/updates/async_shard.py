"""A shard that applies each push at once, under `ssp` and `async`.

A micro-batch's contribution may come in several messages, with messages of other workers in between. All its parts are applied on
the terms of the first part (`ps/params/planned_rates.py`). Server 0 reports the contribution to the ledger when its first part
comes. So the ledger's rows are in the order in which server 0 began to apply them, and have server 0's staleness. Other servers
may see another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import msgspec
import torch

from roundtable.common.config.batch_plan import Round
from roundtable.common.config.weights import weight_if_given
from roundtable.common.model.metrics import Metrics, add_metrics, mean_metrics
from roundtable.common.model.partial_sum import Sum, is_mean
from roundtable.common.model.reduction_tree import fold
from roundtable.common.protocol.effects import Send
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.commit import Committed, Contribution
from roundtable.common.protocol.messages.embedding import RowPush
from roundtable.common.protocol.messages.gradients import Pull, Push, VersionExpired
from roundtable.common.protocol.messages.sharded import LayerPush
from roundtable.common.protocol.transport import Frames
from roundtable.common.runtime.errors import UsageError, WireError
from roundtable.common.runtime.failpoints import failpoint
from roundtable.ps.params.planned_rates import PlannedRates, Terms, TypicalWeight, of_group
from roundtable.ps.shard.checkpoint_writer import Source
from roundtable.ps.shard.kinds import METRICS, ParameterKind
from roundtable.ps.shard.model import ShardModel
from roundtable.ps.shard.shard import Shard, ShardParts, contribution

#: At most this many workers have weight buffers in shared memory. Other workers get weights through sockets.
_PAIRS = 64
#: Weight buffers: two for each of these workers.
BUFFERS = 2 * _PAIRS
#: `missing_later` stops at this many micro-batches or rounds.
_MOST_MISSING = 2000


class AsyncShard(Shard):
    """A shard under `ssp` or `async`.

    A worker's clock is the round that it works on. The slowest clock is the earliest round with a micro-batch outstanding here.
    """

    def __init__(self, parts: ShardParts, model: ShardModel) -> None:
        super().__init__(parts, model)
        #: The slowest clock. Rounds from this one on are open.
        self._slowest = 0
        #: By open round and micro-batch: the chunks that were applied. METRICS counts as a chunk on server 0.
        self._applied: dict[int, dict[int, set[int]]] = {}
        #: The newest round that a worker has contributed to, or asked for the weights of.
        self._reached = 0
        #: The newest round for which a worker was given weights to start from.
        self._served = -1
        #: On server 0, by open round and micro-batch: the metrics.
        self._metrics: dict[int, dict[int, Metrics]] = {}
        #: By open round and micro-batch: a contribution that is not finite, and its chunks that were dropped here.
        self._drops: dict[int, dict[int, tuple[Contribution, set[int]]]] = {}
        #: The learning rates. It also counts distinct micro-batches, the unit of staleness.
        self._course = PlannedRates(self._policy)
        #: Estimates the weight of a whole round.
        self._typical = TypicalWeight()
        #: By open round and micro-batch: the terms on which the contribution is applied.
        self._terms: dict[tuple[int, int], Terms] = {}
        #: On server 0, by open round and micro-batch: the contribution's row in the ledger.
        self._ahead: dict[tuple[int, int], Contribution] = {}
        #: By chunk: a copy of the current weights, until the next update.
        self._published: dict[int, torch.Tensor] = {}
        #: By chunk: the frame of the weight codec with the current weights.
        self._coded: dict[int, memoryview] = {}
        #: For delay compensation, by worker and chunk: the weights that the worker was sent last.
        self._sent: dict[str, dict[int, torch.Tensor]] = {}
        #: By worker: the number n of its weight buffers 2n and 2n + 1. The worker may read one while the other is written.
        self._pairs: dict[str, int] = {}

    @property
    def version(self) -> int:
        return self._slowest

    def missing(self) -> list[int]:
        return self._missing_from(self._slowest) if self._slowest < self._plans.end else []

    def missing_later(self) -> list[list[int]]:
        found: list[list[int]] = []
        told = 0
        for round_ in range(self._slowest + 1, min(self._reached + 1, self._plans.end)):
            found.append(self._missing_from(round_)[:_MOST_MISSING])
            told += len(found[-1])
            if told >= _MOST_MISSING or len(found) >= _MOST_MISSING:
                break
        return found

    def _missing_from(self, round_: int) -> list[int]:
        applied, whole = self._applied.get(round_, {}), len(self.model.ids)
        return [k for k in range(self._plans.round(round_).micro_batches) if len(applied.get(k, ())) < whole]

    def opened(self, source: Source | None) -> None:
        self.model.frozen.place()
        self.model.frozen.note_changes(0)

    @property
    def first_not_begun(self) -> int:
        return max(self._slowest, self._served + 1, *(round_ + 1 for round_ in self._applied))

    def extra(self) -> dict[str, Any]:
        applied = [
            (round_, sorted((chunk, k) for k, chunks in found.items() for chunk in chunks))
            for round_, found in self._applied.items()
        ]
        metrics = [(round_, k, values) for round_, found in self._metrics.items() for k, values in found.items()]
        counted = [msgspec.to_builtins(row) for row in self._ahead.values()]
        drops = [(msgspec.to_builtins(row), sorted(chunks)) for found in self._drops.values() for row, chunks in found.values()]
        return {
            "seen": self._course.seen, "typical": self._typical.sums,
            "applied": applied, "metrics": metrics, "counted": counted, "drops": drops,
        }  # fmt: skip

    def resume(self, source: Source) -> None:
        """Continue at the checkpoint's round. Micro-batches of later rounds that any server has applied are not applied again."""
        self._slowest = source.round
        self._course = PlannedRates(self._policy, max(int(extra["seen"]) for extra in source.extra.values()))
        self._typical = TypicalWeight(next(iter(source.extra.values())).get("typical", (0.0, 0.0)))
        own, kinds = set(self.model.ids), {kind.number for kind in self.model.kinds}
        for number, extra in source.extra.items():
            mine = own if number == self._index else own - kinds
            for round_, pairs in extra["applied"]:
                if source.servers != self._settings.servers and any(chunk < METRICS for chunk, _ in pairs):
                    raise UsageError(
                        f"the checkpoint of round {source.round} has rows of later rounds, and each of {source.servers} servers "
                        "knows its own: go on with as many servers, or from a checkpoint of the run's end."
                    )
                for chunk, k in pairs:
                    if chunk in mine:
                        self._applied.setdefault(int(round_), {}).setdefault(int(k), set()).add(int(chunk))
            for builtins, chunks in extra.get("drops", ()):
                row = msgspec.convert(builtins, Contribution)
                for chunk in mine.intersection(chunks):
                    self._drop(row, chunk)
        if self._index == 0:
            for round_, k, values in source.extra[0]["metrics"]:
                self._metrics.setdefault(int(round_), {})[int(k)] = {name: (a, b) for name, (a, b) in values.items()}
            for row in msgspec.convert(source.extra[0]["counted"], list[Contribution]):
                self._ahead[row.round, row.lo] = row
                self._reports.contributions.append(row)

    def forget(self, worker: str) -> None:
        super().forget(worker)
        self._sent.pop(worker, None)
        self._pairs.pop(worker, None)

    def plan_known(self) -> list[Send]:
        return self._advance()  # a checkpoint may have had all of its first round

    def handle(self, sender: str, body: Body, frames: Frames, now: float) -> list[Send]:
        if not (isinstance(body, Push | RowPush | LayerPush) and self._plans.is_held(body.round)):
            return super().handle(sender, body, frames, now)
        return [self._ack_of(sender, body)] if self._plans.has_end else []  # else the worker sends it again

    def released(self, now: float) -> list[Send]:
        return self._advance() + self.serve_all()

    def push(self, sender: str, push: Push, values: Callable[[], Sequence[Sum]], now: float) -> list[Send]:
        plan = self._single(sender, push)
        found = values()
        accounts = push.metrics is not None and self._index == 0
        if push.round < self._slowest:
            if accounts:
                self._reports.contributions.append(contribution(sender, push, "duplicate"))
            return [self._ack(sender, push)]
        failpoint("aggregating", push.round)
        applied, terms = self._arrives(sender, push, plan)
        hypers, chunks, weight = terms.hypers, self.model.chunks, push.total_weight
        for chunk, value in zip(push.chunks, found, strict=True):
            if chunk in applied:
                continue
            applied.add(chunk)
            if not push.finite:
                self._drop(_dropped(sender, push), chunk)
            self._counts(sender, push, chunk)
            self.model.dense.apply(
                chunk,
                [value if push.finite and (weight or not is_mean(chunks[chunk].kind)) else Sum(value.values, 0)],
                weight,
                of_group(hypers, chunks[chunk].group),
                lr_scale=terms.lr_scale,
                then=self._computed_from(sender, chunk),
            )
            self._progress.step()
            self.model.frozen.note_changes(0)
            self._published.pop(chunk, None)
            self._coded.pop(chunk, None)
            failpoint("applying", push.round)
        if accounts and push.metrics is not None:
            if METRICS in applied or self._ahead[push.round, push.lo].worker != sender:
                self._reports.contributions.append(contribution(sender, push, "duplicate"))
            if METRICS not in applied:
                applied.add(METRICS)
                if not push.finite:
                    self._drop(_dropped(sender, push), METRICS)
                self._metrics.setdefault(push.round, {})[push.lo] = push.metrics if push.finite else {}
        failpoint("applied", push.round)
        return [self._ack(sender, push), *self._advance()]

    def _computed_from(self, sender: str, chunk: int) -> torch.Tensor | None:
        """Return the weights that a worker's contribution was computed from, or None if they are not kept."""
        buffers, compensates = self.model.buffers, self._settings.delay_compensation
        first = buffers[buffers.home][chunk] if chunk in self.model.frozen and compensates else None
        return self._sent.get(sender, {}).get(chunk, first)

    def _single(self, sender: str, push: Push | RowPush | LayerPush) -> Round:
        """Return the plan of a push's round. Raises WireError if the push has more than one micro-batch."""
        if push.hi != push.lo + 1:
            raise WireError(f"{sender} pushed a sum of micro-batches, but policy {self._settings.policy} applies each on its own")
        return self._plans.round(push.round)

    def _arrives(self, sender: str, push: Push | RowPush | LayerPush, plan: Round) -> tuple[set[int], Terms]:
        """Return the chunks of the push's micro-batch that are applied already, and the terms on which to apply the rest."""
        key = push.round, push.lo
        self._reached = max(self._reached, push.round)
        applied = self._applied.setdefault(push.round, {}).setdefault(push.lo, set())
        if key not in self._terms:
            terms = self._course.take(push.round, push.base_version, push.hypers, self._plans.segments, is_new=not applied)
            whole = self._typical.of_round(push.total_weight, push.samples, plan.samples)
            self._terms[key] = replace(terms, lr_scale=terms.lr_scale * push.total_weight / whole if whole else 0.0)
        if self._index == 0 and key not in self._ahead:
            outcome: Literal["committed", "dropped"] = "committed" if push.finite else "dropped"
            staleness = self._terms[key].staleness
            row = Contribution(push.round, push.lo, push.hi, sender, push.samples, 1, outcome, staleness, push.weight)
            self._ahead[key] = row
            self._reports.contributions.append(row)
        return applied, self._terms[key]

    def push_kind(self, kind: ParameterKind, sender: str, push: Any, frames: Frames, now: float) -> list[Send]:
        plan, ack = self._single(sender, push), Send(sender, kind.ack(push))
        if push.round < self._slowest or kind.number in self._applied.get(push.round, {}).get(push.lo, ()):
            return [ack]  # the push's questions to sharded layers may be forgotten, so do not read it
        found = self._validator.of_kind(kind, sender, push, frames, plan)
        applied, terms = self._arrives(sender, push, plan)
        applied.add(kind.number)
        if not push.finite:
            self._drop(_dropped(sender, push), kind.number)
        weight = push.total_weight
        kind.apply(found if push.finite and weight else kind.nothing(), push.round, weight, terms.hypers, terms.lr_scale)
        return [ack, *self._advance()]

    def _weight_of(self, round_: int) -> float:
        """Return the weight of all that counts in a round."""
        rows = [row for row in self._ahead.values() if row.round == round_ and row.outcome != "dropped"]
        return sum(row.total_weight for row in rows)

    def _drop(self, row: Contribution, chunk: int) -> None:
        """Record that this chunk of a micro-batch was dropped."""
        self._drops.setdefault(row.round, {}).setdefault(row.lo, (row, set()))[1].add(chunk)

    def _advance(self) -> list[Send]:
        """Close the complete rounds. Return messages to the workers that may go on now."""
        before = self._slowest
        while self._slowest < self._plans.end and not self._missing_from(self._slowest):
            plan = self._plans.round(self._slowest)
            if self._index == 0:
                total = fold(self._metrics.pop(self._slowest), plan.micro_batches, add_metrics)
                gone = [row for key, row in self._ahead.items() if key[0] == self._slowest and row.outcome == "dropped"]
                samples, count = plan.samples - sum(row.samples for row in gone), plan.micro_batches - len(gone)
                weight = self._weight_of(self._slowest)
                told = weight_if_given(weight, samples)
                self._reports.rounds.append(Committed(self._slowest, samples, count, len(gone), mean_metrics(total), told))
            for row, chunks in self._drops.pop(self._slowest, {}).values():
                whole = len(chunks) == len(self.model.ids)
                self._reports.dropped.append(row if whole else msgspec.structs.replace(row, outcome="dropped in part"))
            self._applied.pop(self._slowest, None)
            self._ahead = {key: row for key, row in self._ahead.items() if key[0] > self._slowest}
            self._terms = {key: terms for key, terms in self._terms.items() if key[0] > self._slowest}
            self._slowest += 1
            self.model.layers.forget_before(self._slowest)
            self._checkpoint.round_closed(self)
        return self.serve_all() if self._slowest > before else []

    def serve(self, worker: str) -> list[Send]:
        waiter = self.sender.waiting[worker]
        pull = waiter.pull
        self._reached = max(self._reached, pull.for_round)
        # a worker that joins late begins in the newest closed round: every other server lets it go on there
        if pull.number == 1 and pull.for_round < self._slowest - 1 and self.model.is_open:
            del self.sender.waiting[worker]
            return [Send(worker, VersionExpired(pull.for_round, self._slowest - 1))]
        if waiter.weights is None:
            if not self.model.is_open or not self._may_have(pull):
                return []
            self.sender.update_needs(waiter)
            waiter.version = self._course.seen
            waiter.weights = self._as_now(worker, pull, waiter.unsent)
            waiter.coded = {chunk: self._coded[chunk] for chunk in waiter.unsent & self._coded.keys() if not pull.full_precision}
        weights = {chunk: waiter.weights[chunk] for chunk in waiter.unsent}
        return self.sender.send(worker, waiter.version, self._buffer_for(worker, pull), weights, True, waiter.coded)

    def _may_have(self, pull: Pull) -> bool:
        """Return True if a worker may have the weights that it asks for."""
        if pull.after_all_updates or (self._plans.has_end and self._plans.is_held(pull.for_round)):
            return self._slowest >= pull.for_round
        if self._plans.is_held(pull.for_round) or not self._policy.may_start(pull.for_round, self._slowest):
            return False
        self._served = max(self._served, pull.for_round)
        return True

    def _buffer_for(self, worker: str, pull: Pull) -> int:
        """Return the one of the worker's two weight buffers that the worker does not read, or -1 if the worker has none."""
        if pull.shared and worker not in self._pairs:
            self._pairs[worker] = next(n for n in range(len(self._pairs) + 1) if n not in self._pairs.values())
        pair = self._pairs[worker] if pull.shared else _PAIRS
        return 2 * pair + (pull.weight_buffer + 1) % 2 if pair < _PAIRS else -1

    def _as_now(self, worker: str, pull: Pull, chunks: set[int]) -> dict[int, torch.Tensor]:
        """Return the current weights of `chunks`, in memory that no later update changes."""
        if pull.full_precision:
            return {chunk: self.model.dense.master(chunk) for chunk in chunks}
        home = self.model.buffers[self.model.buffers.home]
        still = {chunk: home[chunk] for chunk in chunks if self.model.frozen.unchanged(chunk, pull.for_round)}
        return {**still, **self._moving_now(worker, pull, chunks - still.keys())}

    def _moving_now(self, worker: str, pull: Pull, chunks: set[int]) -> dict[int, torch.Tensor]:
        buffer = self._buffer_for(worker, pull)
        if buffer >= 0:
            held = {chunk: self.model.buffers[buffer][chunk] for chunk in chunks}
            for chunk, into in held.items():
                self.model.dense.publish(chunk, into)
        else:
            for chunk in chunks - self._published.keys():
                self._published[chunk] = weights = self.model.dense.publish(chunk)
                if (frame := self.model.dense.frame(chunk, weights)) is not None:
                    self._coded[chunk] = frame
            held = {chunk: self._published[chunk] for chunk in chunks}
        if self._settings.delay_compensation:
            then = held if buffer < 0 else {chunk: values.clone() for chunk, values in held.items()}
            self._sent[worker] = {**self._sent.get(worker, {}), **then}
        return held


def _dropped(sender: str, push: Push | RowPush | LayerPush) -> Contribution:
    return Contribution(push.round, push.lo, push.hi, sender, push.samples, 1, "dropped")
