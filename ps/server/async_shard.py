"""A server that applies each push at once: `ssp`, `async`.

A micro-batch may come in several messages, with those of others in between. All its parts are applied on the terms of the first
one (`ps/params/planned_rates.py`), and server 0 enters it in the books when that comes. So rows of the books are in the order in
which server 0 began to apply micro-batches, and their staleness is that with which it applied them. Other servers may see another
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import msgspec
import torch

from roundtable.common.config.batch_plan import Round, Segment
from roundtable.common.config.settings import Settings
from roundtable.common.model.partial_sum import Sum
from roundtable.common.model.reduction_tree import fold
from roundtable.common.model.sparse_rows import no_rows
from roundtable.common.policies import Policy
from roundtable.common.protocol.effects import Send
from roundtable.common.protocol.messages.commit import Committed, Contribution
from roundtable.common.protocol.messages.embedding import RowAck, RowPush
from roundtable.common.protocol.messages.gradients import Pull, Push, VersionExpired
from roundtable.common.protocol.messages.sharded import LayerAck, LayerPush
from roundtable.common.protocol.transport import Frames
from roundtable.common.runtime.errors import UsageError, WireError
from roundtable.common.runtime.failpoints import failpoint
from roundtable.ps.params.planned_rates import PlannedRates, Terms
from roundtable.ps.server.checkpoint_writer import Source
from roundtable.ps.server.shard import CLASSES, METRICS, ROWS, Metrics, Shard, add_metrics, contribution, mean_metrics

#: Workers that can have planes to read their weights from; the others are sent them.
_PAIRS = 64
#: Micro-batches, and rounds, that the coordinator is told of as missing from rounds after the earliest open one.
_TOLD = 2000


class AsyncShard(Shard):
    """A worker's clock is the round it works on; the slowest clock is the earliest round with something outstanding here."""

    def __init__(self, index: int, settings: Settings, policy: Policy, source: Source | None = None) -> None:
        super().__init__(index, settings, policy, source)
        self._slowest = 0
        #: For rounds not complete: the chunks that were applied of each micro-batch. METRICS counts as a chunk on server 0.
        self._applied: dict[int, dict[int, set[int]]] = {}
        #: The newest round that a worker has contributed to or asked for the weights of.
        self._reached = 0
        self._metrics: dict[int, dict[int, Metrics]] = {}
        #: What was dropped of them as not finite, and which chunks.
        self._drops: dict[int, dict[int, tuple[Contribution, set[int]]]] = {}
        #: Counts distinct micro-batches, which is what staleness is counted in.
        self._course = PlannedRates(policy)
        #: For rounds not complete: the terms on which each micro-batch is applied.
        self._terms: dict[tuple[int, int], Terms] = {}
        #: On server 0, contributions to rounds that are not complete, as the ledger has them.
        self._ahead: dict[tuple[int, int], Contribution] = {}
        #: Copies of weights, by chunk, until the next update, and frames of the weight codec with the same; and those each worker
        #: was last sent, for delay compensation.
        self._published: dict[int, torch.Tensor] = {}
        self._coded: dict[int, memoryview] = {}
        self._sent: dict[str, dict[int, torch.Tensor]] = {}
        #: The two planes of each worker, by turns: it may read one while the other is written.
        self._pairs: dict[str, int] = {}

    @property
    def version(self) -> int:
        return self._slowest

    def missing(self) -> list[int]:
        return self._missing_from(self._slowest) if self._slowest < self._end else []

    def missing_later(self) -> list[list[int]]:
        found: list[list[int]] = []
        told = 0
        for round_ in range(self._slowest + 1, min(self._reached + 1, self._end)):
            found.append(self._missing_from(round_)[:_TOLD])
            told += len(found[-1])
            if told >= _TOLD or len(found) >= _TOLD:
                break
        return found

    def _missing_from(self, round_: int) -> list[int]:
        applied, whole = self._applied.get(round_, {}), len(self._ids)
        return [k for k in range(self.round_plan(round_).micro_batches) if len(applied.get(k, ())) < whole]

    @property
    def _end(self) -> int:
        """The first round that no plan knows yet."""
        return self.segments[-1].end if self.segments else 0

    def _opened(self) -> None:
        self._settle_still()
        self._moves(0)

    @property
    def _at_border(self) -> bool:
        return True  # what is applied of later rounds is known, and counts

    def _extra(self) -> dict[str, Any]:
        applied = [
            (round_, sorted((chunk, k) for k, chunks in found.items() for chunk in chunks))
            for round_, found in self._applied.items()
        ]
        metrics = [(round_, k, values) for round_, found in self._metrics.items() for k, values in found.items()]
        counted = [msgspec.to_builtins(row) for row in self._ahead.values()]
        drops = [(msgspec.to_builtins(row), sorted(chunks)) for found in self._drops.values() for row, chunks in found.values()]
        return {"seen": self._course.seen, "applied": applied, "metrics": metrics, "counted": counted, "drops": drops}

    def _resume(self, source: Source) -> None:
        """What was applied of later rounds, by whichever server, is not to be applied again."""
        self._slowest = source.round
        self._course = PlannedRates(self.policy, max(int(extra["seen"]) for extra in source.extra.values()))
        own = set(self._ids)
        for number, extra in source.extra.items():
            mine = own if number == self.index else own - {ROWS, CLASSES}
            for round_, pairs in extra["applied"]:
                if source.servers != self.settings.servers and any(chunk in (ROWS, CLASSES) for chunk, _ in pairs):
                    raise UsageError(
                        f"the snapshot of round {source.round} has rows of later rounds, and each of {source.servers} servers "
                        "knows its own: go on with as many servers, or from a snapshot of the run's end."
                    )
                for chunk, k in pairs:
                    if chunk in mine:
                        self._applied.setdefault(int(round_), {}).setdefault(int(k), set()).add(int(chunk))
            for builtins, chunks in extra.get("drops", ()):
                row = msgspec.convert(builtins, Contribution)
                for chunk in mine.intersection(chunks):
                    self._drop(row, chunk)
        if self.index == 0:
            for round_, k, values in source.extra[0]["metrics"]:
                self._metrics.setdefault(int(round_), {})[int(k)] = {name: (a, b) for name, (a, b) in values.items()}
            for row in msgspec.convert(source.extra[0]["counted"], list[Contribution]):
                self._ahead[row.round, row.lo] = row
                self._news.append(row)

    def _forget(self, worker: str) -> None:
        super()._forget(worker)
        self._sent.pop(worker, None)
        self._pairs.pop(worker, None)

    @property
    def _plane_count(self) -> int:
        return 2 * _PAIRS

    def _plan(self, sender: str, segment: Segment) -> list[Send]:
        return super()._plan(sender, segment) + self._advance()  # a snapshot may have had all of its first round

    def _push(self, sender: str, push: Push, frames: Frames, now: float, values: Sequence[Sum] | None = None) -> list[Send]:
        plan = self._plan_of(sender, push)
        values = self._check(sender, push, frames, plan, values)
        accounts = push.metrics is not None and self.index == 0
        if push.round < self._slowest:
            if accounts:
                self._news.append(contribution(sender, push, "duplicate"))
            return [self._ack(sender, push)]
        assert self.store is not None
        failpoint("aggregating", push.round)
        applied, terms = self._arrives(sender, push, plan)
        hypers = terms.hypers
        for chunk, value in zip(push.chunks, values, strict=True):
            if chunk in applied:
                continue
            applied.add(chunk)
            if not push.finite:
                self._drop(_dropped(sender, push), chunk)
            self._counts(sender, push, chunk)
            self.store.apply(
                chunk,
                [value if push.finite else Sum(value.values, 0)],
                push.samples,
                hypers[self.chunks[chunk].group] if 0 <= self.chunks[chunk].group < len(hypers) else {},
                lr_scale=terms.lr_scale,
                then=self._computed_from(sender, chunk),
            )
            self._did_part()
            self._moves(0)
            self._published.pop(chunk, None)
            self._coded.pop(chunk, None)
            failpoint("applying", push.round)
        if accounts and push.metrics is not None:
            if METRICS in applied or self._ahead[push.round, push.lo].worker != sender:
                self._news.append(contribution(sender, push, "duplicate"))
            if METRICS not in applied:
                applied.add(METRICS)
                if not push.finite:
                    self._drop(_dropped(sender, push), METRICS)
                self._metrics.setdefault(push.round, {})[push.lo] = push.metrics if push.finite else {}
        failpoint("applied", push.round)
        return [self._ack(sender, push), *self._advance()]

    def _computed_from(self, sender: str, chunk: int) -> torch.Tensor | None:
        """The weights that a worker's contribution was computed from, where those are kept."""
        assert self.planes is not None
        first = self.planes[self.planes.home][chunk] if chunk in self._frozen and self.settings.delay_compensation else None
        return self._sent.get(sender, {}).get(chunk, first)

    def _plan_of(self, sender: str, push: Push | RowPush | LayerPush) -> Round:
        """The plan of a push's round. Raises WireError where it is not of one micro-batch."""
        if push.hi != push.lo + 1:
            raise WireError(f"{sender} pushed a sum of micro-batches, but policy {self.settings.policy} applies each on its own")
        return self.round_plan(push.round)

    def _arrives(self, sender: str, push: Push | RowPush | LayerPush, plan: Round) -> tuple[set[int], Terms]:
        """What is applied of the push's micro-batch already, and the terms on which the rest is to be."""
        key = push.round, push.lo
        self._reached = max(self._reached, push.round)
        applied = self._applied.setdefault(push.round, {}).setdefault(push.lo, set())
        if key not in self._terms:
            terms = self._course.take(push.round, push.base_version, push.hypers, self.segments, is_new=not applied)
            self._terms[key] = replace(terms, lr_scale=terms.lr_scale * push.samples / plan.samples)
        if self.index == 0 and key not in self._ahead:
            outcome: Literal["committed", "dropped"] = "committed" if push.finite else "dropped"
            staleness = self._terms[key].staleness
            row = Contribution(push.round, push.lo, push.hi, sender, push.samples, 1, outcome, staleness)
            self._ahead[key] = row
            self._news.append(row)
        return applied, self._terms[key]

    def _push_rows(self, sender: str, push: RowPush, frames: Frames, now: float) -> list[Send]:
        plan = self._plan_of(sender, push)
        rows = self._check_rows(sender, push, frames, plan)
        ack = Send(sender, RowAck(push.round, push.lo, push.hi))
        if push.round < self._slowest:
            return [ack]
        assert self.tables is not None
        applied, terms = self._arrives(sender, push, plan)
        if ROWS not in applied:
            applied.add(ROWS)
            if not push.finite and self.layout is not None:
                self._drop(_dropped(sender, push), ROWS)
                rows = [no_rows(spec) for spec in self.layout.tables]
            self.tables.apply(rows, push.samples, terms.hypers, terms.lr_scale)
        return [ack, *self._advance()]

    def _push_classes(self, sender: str, push: LayerPush, frames: Frames, now: float) -> list[Send]:
        plan = self._plan_of(sender, push)
        ack = Send(sender, LayerAck(push.round, push.lo, push.hi))
        if push.round < self._slowest or CLASSES in self._applied.get(push.round, {}).get(push.lo, ()):
            return [ack]  # what was asked is forgotten then
        parts = self._check_classes(sender, push, frames, plan)
        assert self.classifiers is not None
        applied, terms = self._arrives(sender, push, plan)
        applied.add(CLASSES)
        if not push.finite:
            self._drop(_dropped(sender, push), CLASSES)
        counted = parts if push.finite else []
        self.classifiers.apply(counted, push.round, push.samples, terms.hypers, terms.lr_scale)
        return [ack, *self._advance()]

    def _drop(self, row: Contribution, chunk: int) -> None:
        """Note that this chunk of a micro-batch was dropped."""
        self._drops.setdefault(row.round, {}).setdefault(row.lo, (row, set()))[1].add(chunk)

    def _advance(self) -> list[Send]:
        """Close rounds of which nothing is outstanding, and serve who may go on now."""
        before = self._slowest
        while self._slowest < self._end and not self._missing_from(self._slowest):
            plan = self.round_plan(self._slowest)
            if self.index == 0:
                total = fold(self._metrics.pop(self._slowest), plan.micro_batches, add_metrics)
                gone = [row for key, row in self._ahead.items() if key[0] == self._slowest and row.outcome == "dropped"]
                samples, count = plan.samples - sum(row.samples for row in gone), plan.micro_batches - len(gone)
                self._rounds.append(Committed(self._slowest, samples, count, len(gone), mean_metrics(total)))
            for row, chunks in self._drops.pop(self._slowest, {}).values():
                whole = len(chunks) == len(self._ids)
                self._dropped.append(row if whole else msgspec.structs.replace(row, outcome="dropped in part"))
            self._applied.pop(self._slowest, None)
            self._ahead = {key: row for key, row in self._ahead.items() if key[0] > self._slowest}
            self._terms = {key: terms for key, terms in self._terms.items() if key[0] > self._slowest}
            self._slowest += 1
            if self.classifiers is not None:
                self.classifiers.forget_before(self._slowest)
            self._try_cut()
        return self._serve_all() if self._slowest > before else []

    def _serve(self, worker: str) -> list[Send]:
        waiter = self.waiters[worker]
        pull = waiter.pull
        self._reached = max(self._reached, pull.for_round)
        # who joins late begins in the last round that is over, which is as far as every other server lets it go on
        if pull.number == 1 and pull.for_round < self._slowest - 1 and self._open:
            del self.waiters[worker]
            return [Send(worker, VersionExpired(pull.for_round, self._slowest - 1))]
        if waiter.weights is None:
            may = (
                self._slowest >= pull.for_round
                if pull.after_all_updates
                else self.policy.may_start(pull.for_round, self._slowest)
            )
            if not self._open or not may:
                return []
            self._needs(waiter)
            waiter.version = self._course.seen
            waiter.weights = self._as_now(worker, pull, waiter.unsent)
            waiter.coded = {chunk: self._coded[chunk] for chunk in waiter.unsent & self._coded.keys() if not pull.full_precision}
        weights = {chunk: waiter.weights[chunk] for chunk in waiter.unsent}
        return self._weights(worker, waiter.version, self._plane(worker, pull), weights, True, waiter.coded)

    def _plane(self, worker: str, pull: Pull) -> int:
        """The plane to write a worker's weights to: of its two the one that it does not read. -1: it has none."""
        if pull.shared and worker not in self._pairs:
            self._pairs[worker] = next(n for n in range(len(self._pairs) + 1) if n not in self._pairs.values())
        pair = self._pairs[worker] if pull.shared else _PAIRS
        return 2 * pair + (pull.weight_buffer + 1) % 2 if pair < _PAIRS else -1

    def _as_now(self, worker: str, pull: Pull, chunks: set[int]) -> dict[int, torch.Tensor]:
        """The weights as they are, in memory that no later update touches."""
        assert self.store is not None and self.planes is not None
        if pull.full_precision:
            return {chunk: self.store.master(chunk) for chunk in chunks}
        still = {chunk: self.planes[self.planes.home][chunk] for chunk in chunks if self._lies_still(chunk, pull.for_round)}
        return {**still, **self._moving_now(worker, pull, chunks - still.keys())}

    def _moving_now(self, worker: str, pull: Pull, chunks: set[int]) -> dict[int, torch.Tensor]:
        assert self.store is not None and self.planes is not None
        plane = self._plane(worker, pull)
        if plane >= 0:
            held = {chunk: self.planes[plane][chunk] for chunk in chunks}
            for chunk, into in held.items():
                self.store.publish(chunk, into)
        else:
            for chunk in chunks - self._published.keys():
                self._published[chunk] = weights = self.store.publish(chunk)
                if (frame := self.store.frame(chunk, weights)) is not None:
                    self._coded[chunk] = frame
            held = {chunk: self._published[chunk] for chunk in chunks}
        if self.settings.delay_compensation:
            then = held if plane < 0 else {chunk: values.clone() for chunk, values in held.items()}
            self._sent[worker] = {**self._sent.get(worker, {}), **then}
        return held


def _dropped(sender: str, push: Push | RowPush | LayerPush) -> Contribution:
    return Contribution(push.round, push.lo, push.hi, sender, push.samples, 1, "dropped")
