"""A server that applies once per round: `sync`, `backup`, `local`, `average`."""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Sequence
from typing import Any

import torch

from roundtable.common.codecs.registry import sends_changes
from roundtable.common.config.settings import Settings
from roundtable.common.model.layout import Chunk, urgency
from roundtable.common.model.nonfinite import ADVICE, sentence, tensors_not_finite
from roundtable.common.model.partial_sum import Sum
from roundtable.common.model.reduction_tree import Span, TreeSum, fold
from roundtable.common.model.sparse_rows import add_tables, cut, cut_sums, no_rows
from roundtable.common.model.tensor_bytes import to_frame
from roundtable.common.policies import Policy
from roundtable.common.protocol.effects import COORDINATOR, KEEPER, AboutCopies, Send
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.commit import AllNorms, CloseRound, Committed, Contribution, Norms, RoundReady
from roundtable.common.protocol.messages.embedding import RowAck, RowPush
from roundtable.common.protocol.messages.gradients import Pull, Push, VersionExpired
from roundtable.common.protocol.messages.replication import (
    Replicate,
    ReplicateLayers,
    ReplicateRows,
    RoundReplicated,
    StateHeader,
)
from roundtable.common.protocol.messages.sharded import LayerAck, LayerPush
from roundtable.common.protocol.transport import ASK_AGAIN_S, Frames
from roundtable.common.runtime.errors import UsageError, WireError
from roundtable.common.runtime.failpoints import failpoint
from roundtable.ps.params.clipping import Norm
from roundtable.ps.params.dense import NotFinite
from roundtable.ps.replication.manager import ReplicationManager
from roundtable.ps.replication.shard_state import ShardState
from roundtable.ps.replication.state_transfer import Incoming
from roundtable.ps.server.checkpoint_writer import Source
from roundtable.ps.server.shard import CLASSES, METRICS, ROWS, Shard, WaitingWorker, add_metrics, contribution, mean_metrics
from roundtable.ps.sharded.layers import contributed, tensors_of

log = logging.getLogger("roundtable.ps.round_shard")

#: Planes for weights: the current version's, the next one's, and two for those who lag behind.
_PLANES = 4


class SyncShard(Shard):
    """Round t is open while the version is t. Each chunk is applied as soon as its sum is final, into another plane, and
    handed out at once to who waits for W(t+1); the round closes when all are. W(t) stays whole for those who still need it,
    and as long as somebody reads it and there is room, so do earlier ones."""

    def __init__(self, index: int, settings: Settings, policy: Policy, source: Source | None = None) -> None:
        super().__init__(index, settings, policy, source)
        self._version = 0
        #: The version in each plane; that of this version is always among them.
        self._contents: dict[int, int] = {0: 0}
        #: By plane and chunk: frames of the weight codec.
        self._coded: dict[int, dict[int, memoryview]] = {}
        #: `backup`: (round, micro-batch) left out of closed rounds, that nobody has sent yet.
        self._left_out: set[tuple[int, int]] = set()
        #: What the coordinator has decided about this round and the one before, for one that takes over the run.
        self._told: list[CloseRound | AllNorms] = []
        #: Copies of shards on other servers, if there are to be any.
        self._neighbours = (
            ReplicationManager(index, settings, policy, self._head, self._made_again) if settings.replicas else None
        )
        self._open_round()

    def _open_round(self) -> None:
        #: Contributions by chunk (METRICS included): summed as they come, or kept apart where some may be left out.
        self._sums: dict[int, TreeSum[Any]] = {}
        self._leaves: dict[int, dict[int, Any]] = {}
        #: Spans that count in this round, as the ledger will have them.
        self._filed: dict[Span, Contribution] = {}
        #: Contributions to this round that lie in workers' memory: nobody has looked yet whether they are finite.
        self._read: list[tuple[str, Push, Sequence[Sum]]] = []
        #: Samples behind each leaf, and its weight in the mean, where workers step locally and the plan cannot tell.
        self._leaf_samples: dict[int, int] = {}
        self._leaf_weights: dict[int, int] = {}
        #: Where clipping waits for all norms: mean contributions that are final. Chunks that are applied, and the plane that
        #: their next weights are in.
        self._means: dict[int, Sum] = {}
        self._next: set[int] = set()
        self._target: int | None = None
        self._hypers: list[dict[str, Any]] = []
        #: `backup`: the micro-batches to apply, once decided. Clipping: own norms, and everybody's, once known.
        self._closed: list[int] | None = None
        self._own_norms: list[Norm] | None = None
        #: First micro-batches of contributions that are not finite.
        self._with_nan: set[int] = set()
        self._norms: list[Norm] | None = None
        #: Whether rows were not updated yet, as they are on their way to the keeper.
        self._awaits_copy = False
        self._asked: Body | None = None
        self._asked_at = float("-inf")
        #: What the books are to have of the round, once all of it is applied; and what had not come by then.
        self._ending: RoundReplicated | None = None
        self._absent: set[int] = set()

    @property
    def version(self) -> int:
        return self._version

    @property
    def _drops(self) -> bool:
        """Whether something that counts in this round is not finite: then it is dropped, on all servers, as all get told."""
        return bool(self._with_nan if self._closed is None else self._with_nan & set(self._closed))

    def missing(self) -> list[int]:
        if self.policy.is_local or not self._open or not any(s.first_round <= self._version < s.end for s in self.segments):
            return []
        everything = set(range(self._count))
        absent: set[int] = set()
        for chunk in self._ids:
            if not self.policy.combines:
                absent |= everything - set(self._leaves.get(chunk, ()))
            elif chunk not in self._next and chunk not in self._means:
                absent |= set(self._sums[chunk].missing()) if chunk in self._sums else everything
        return sorted(absent)

    def _opened(self) -> None:
        assert self.store is not None and self.planes is not None
        self._settle_still()
        self._moves(self._version)
        plane = self._plane_of(self._version)
        for chunk, into in self.planes[plane].items():
            if self._lies_still(chunk, self._version):
                continue
            self._keep_frame(plane, chunk, self.store.settle(chunk, into))
            if self._source is not None:
                self.store.restore_seen(chunk, self._source.files, into)
        self._have_kept()

    @property
    def _at_border(self) -> bool:
        return not self._next

    @property
    def _seen(self) -> dict[int, torch.Tensor]:
        return {chunk: self._weights_of(self._version, chunk) for chunk in self.chunks}

    def _weights_of(self, version: int, chunk: int) -> torch.Tensor:
        """The weights of a version that is there still, or of the one that is being made."""
        assert self.planes is not None
        plane = self._plane_of(version) if version <= self._version else self._target
        if self._lies_still(chunk, version) or plane is None:
            plane = self.planes.home
        return self.planes[plane][chunk]

    def _resume(self, source: Source) -> None:
        self._version, self._contents = source.round, {0: source.round}

    def _keep_frame(self, plane: int, chunk: int, frame: memoryview | None) -> None:
        if frame is not None:
            self._coded.setdefault(plane, {})[chunk] = frame

    @property
    def _plane_count(self) -> int:
        return _PLANES

    def _plane_of(self, version: int) -> int:
        """The plane with the weights of `version`; -1 where there is none any more."""
        return next((plane for plane, found in self._contents.items() if found == version), -1)

    def _take_plane(self) -> int:
        """The plane for the next version: one that nobody reads, else that of who lags most."""
        current, read = self._plane_of(self._version), self.readers.planes
        free = [plane for plane in range(_PLANES) if plane != current and plane not in read]
        others = [plane for plane in range(_PLANES) if plane != current]
        plane = free[0] if free else min(others, key=lambda other: self._contents.get(other, -1))
        self._contents.pop(plane, None)
        self._coded.pop(plane, None)
        return plane

    @property
    def _count(self) -> int:
        """Leaves of this round's tree: micro-batches, or workers where they step locally."""
        return self.settings.workers if self.policy.is_local else self.round_plan(self._version).micro_batches

    # ---- contributions

    def _push(self, sender: str, push: Push, frames: Frames, now: float, values: Sequence[Sum] | None = None) -> list[Send]:
        if push.round > self._version:
            raise WireError(f"{sender} pushed for round {push.round} while round {self._version} is open")
        accounts = push.metrics is not None and self.index == 0
        if push.round < self._version:
            if accounts:
                late = (push.round, push.lo) in self._left_out
                self._left_out.discard((push.round, push.lo))
                self._news.append(contribution(sender, push, "late" if late else "duplicate"))
            return [self._ack(sender, push)]
        plan = None if self.policy.is_local else self.round_plan(push.round)
        values = self._check(sender, push, frames, plan, values)
        self._check_apart(sender, push)
        if push.gradient_buffer >= 0:
            self._read.append((sender, push, values))
        for chunk, value in zip(push.chunks, values, strict=True):
            if self._file(chunk, (push.lo, push.hi), value):
                self._counts(sender, push, chunk)
                self._found(push)
        if accounts:
            counted = self._file(METRICS, (push.lo, push.hi), push.metrics)
            if counted:
                self._found(push)
            self._account(sender, push, counted)
        failpoint("aggregating", push.round)
        self._leaf_samples.setdefault(push.lo, push.samples)
        self._leaf_weights.setdefault(push.lo, push.weight)
        if not self.policy.is_local and push.gradient_buffer >= 0:
            self.readers.uses(sender, self._plane_of(self._version))
        self._hypers = self._hypers or push.hypers
        return [self._ack(sender, push), *self._advance(now)]

    def _push_rows(self, sender: str, push: RowPush, frames: Frames, now: float) -> list[Send]:
        if push.round > self._version:
            raise WireError(f"{sender} pushed rows for round {push.round} while round {self._version} is open")
        ack = Send(sender, RowAck(push.round, push.lo, push.hi))
        if push.round < self._version:
            return [ack]
        rows = self._check_rows(sender, push, frames, self.round_plan(push.round))
        self._check_apart(sender, push)
        if self._file(ROWS, (push.lo, push.hi), rows):
            self._found(push)
        self._hypers = self._hypers or push.hypers
        return [ack, *self._advance(now)]

    def _push_classes(self, sender: str, push: LayerPush, frames: Frames, now: float) -> list[Send]:
        if push.round > self._version:
            raise WireError(f"{sender} pushed classes for round {push.round} while round {self._version} is open")
        ack = Send(sender, LayerAck(push.round, push.lo, push.hi))
        if push.round < self._version or CLASSES in self._next:  # what was asked is forgotten then
            return [ack]
        parts = self._check_classes(sender, push, frames, self.round_plan(push.round))
        self._check_apart(sender, push)
        if self._file(CLASSES, (push.lo, push.hi), parts):
            self._found(push)
        self._hypers = self._hypers or push.hypers
        return [ack, *self._advance(now)]

    def _check_apart(self, sender: str, push: Push | RowPush | LayerPush) -> None:
        """Raise WireError for a sum where some of it may be left out."""
        if not self.policy.combines and push.hi - push.lo > 1:
            raise WireError(f"{sender} pushed a sum of micro-batches, which policy {self.settings.policy} cannot take apart")

    def _file(self, chunk: int, span: Span, value: Any) -> bool:
        if not self.policy.combines:
            return self._leaves.setdefault(chunk, {}).setdefault(span[0], value) is value
        if chunk not in self._sums:
            self._sums[chunk] = TreeSum(self._count, self._adder(chunk), joins_root=chunk < 0)
        return self._sums[chunk].file(span, value)

    def _found(self, push: Push | RowPush | LayerPush) -> None:
        """A part of this contribution is filed."""
        if not push.finite:
            self._with_nan.add(push.lo)

    def _adder(self, chunk: int) -> Any:
        assert self.store is not None
        return {METRICS: add_metrics, ROWS: add_tables, CLASSES: operator.add}.get(chunk) or self.store.adder(chunk)

    def _account(self, sender: str, push: Push, counted: bool) -> None:
        """Keep the ledger's rows such that each micro-batch is in exactly one committed row."""
        if not counted:
            self._news.append(contribution(sender, push, "duplicate"))
            return
        inside = [s for s in self._filed if push.lo <= s[0] and s[1] <= push.hi] if push.hi - push.lo > 1 else []
        for span in inside:
            part = self._filed.pop(span)
            self._news.append(_with_outcome(part, "duplicate"))
        self._filed[push.lo, push.hi] = contribution(sender, push, "committed")

    # ---- what only all servers together can decide

    def _from_coordinator(self, body: Body, now: float) -> list[Send]:
        match body:
            case CloseRound() | AllNorms() if body.round == self._version and self._open:
                if isinstance(body, CloseRound) and not (
                    body.micro_batches and set(body.micro_batches) <= set(range(self._count))
                ):
                    raise WireError(f"round {body.round} cannot be closed with micro-batches {body.micro_batches[:20]}")
                self._told = [told for told in self._told if told.round >= self._version - 1 and told != body] + [body]
                if isinstance(body, CloseRound):
                    self._closed = body.micro_batches
                else:
                    self._norms = body.norms
            case CloseRound() | AllNorms():
                return []
            case RoundReady() | Norms():  # another server asks this: was it decided before?
                kind = CloseRound if isinstance(body, RoundReady) else AllNorms
                return [Send(COORDINATOR, t) for t in self._told if isinstance(t, kind) and t.round == body.round]
            case _:
                return super()._from_coordinator(body, now)
        return self._advance(now)

    def tick(self, now: float) -> list[Send]:
        self._have_kept()
        effects = super().tick(now) + self._ask(now) + self._forwarded(now)
        return effects + (self._neighbours.ask_back(now) if self._neighbours is not None and self.restoring else [])

    def _ask(self, now: float) -> list[Send]:
        """Ask the coordinator what is needed to go on; again if that was long ago."""
        question = self._question()
        if question is None or (question == self._asked and now < self._asked_at + ASK_AGAIN_S):
            return []
        self._asked, self._asked_at = question, now
        return [Send(COORDINATOR, question)]

    def _question(self) -> Body | None:
        if not self.policy.combines and self._closed is None:
            arrived = self._arrived()
            return RoundReady(self._version, arrived, self.coordinator) if arrived else None
        if self._own_norms is not None and self._norms is None:
            return Norms(self._version, self._own_norms, self.coordinator)
        return None

    def _arrived(self) -> list[int]:
        """Micro-batches that are in, in every chunk here; none while they are too few to close the round with."""
        each = [self._leaves.get(chunk, {}).keys() for chunk in self._ids]
        fewest = min(map(len, each), default=0)
        if not fewest or fewest < self._count - self.policy.may_leave_out:
            return []
        return sorted(set.intersection(*map(set, each)))

    # ---- applying

    def _advance(self, now: float) -> list[Send]:
        """Apply what can be applied, close the round if all is, and serve who waits."""
        assert self.store is not None and self._setup is not None
        before = self._version, len(self._next)
        clips = not self._drops and self._setup[0].update.clip_norm is not None
        for chunk in self.chunks:
            if chunk in self._next or chunk in self._means or (total := self._total(chunk)) is None:
                continue
            if clips:
                self._means[chunk] = self.store.mean(chunk, total, self._weight())
            else:
                self._apply(chunk, total, self._weight(), now)
            self._did_part()
        if clips and self._own_norms is None:
            self._own_norms = self._measured()
        waits = clips and self._norms is None
        factor = self.store.clipping.factor(self._norms) if clips and self._norms is not None else None
        if not waits:
            for chunk in list(self._means):
                self._apply(chunk, [self._means.pop(chunk)], 1, now, factor)
                self._did_part()
        if self.tables and not waits and ROWS not in self._next and (rows := self._total(ROWS)) and self._may_change_rows():
            if self._drops:
                rows = [[no_rows(spec) for spec in self.layout.tables]] if self.layout is not None else rows
            if (keeper := self._keeper) is not None:
                counts = [part.count for part in rows[0]]
                told = ReplicateRows(self._version, self._samples(), counts, self._hypers, _number(factor))
                keeper.forward(told, cut_sums(rows[0]), now)
            self.tables.apply(rows[0], self._samples(), self._hypers, factor=factor)
            self._next.add(ROWS)
        if self.classifiers and not waits and CLASSES not in self._next and (parts := self._total(CLASSES)) is not None:
            counted = [] if self._drops else parts[0]
            if (keeper := self._keeper) is not None:
                what = contributed(self._version, counted, self._samples(), self._hypers, factor)
                keeper.forward(what, [frame for tensor in tensors_of(counted) for frame in cut(tensor)], now)
            self.classifiers.close(counted, self._samples(), self._hypers, factor)
            self._next.add(CLASSES)
        metrics = self._total(METRICS) if self.index == 0 else [{}]
        if self._next >= set(self._ids) - {METRICS} and metrics is not None:
            if self._ending is None:
                self._ending = self._end(mean_metrics(metrics[0]))
                if self._neighbours is not None:
                    self._neighbours.forward(self._ending, (), now)
            if self._neighbours is None or self._neighbours.may_close(self._version):
                self._commit(self._ending)
        news = before != (self._version, len(self._next))
        return self._forwarded(now) + self._ask(now) + (self._serve_all() if news else [])

    def _measured(self) -> list[Norm] | None:
        """The norms of this server's part of the round's mean gradient; None while not all of it is here, or classifiers, which
        take long over theirs, are at it."""
        assert self.store is not None
        totals = {id_: self._total(id_) for id_ in self._ids if id_ in (ROWS, CLASSES)}
        if len(self._means) < len(self.chunks) or None in totals.values() or not (self.chunks or totals):
            return None
        norms: list[Norm] | None = []
        if self.classifiers and (parts := totals[CLASSES]) is not None:
            norms = self.classifiers.norms(parts[0], self._samples())
        if norms is None:
            return None
        if self.tables and (rows := totals[ROWS]) is not None:
            norms = norms + self.tables.norms(rows[0], self._samples())
        return norms + [norm for chunk in self.chunks for norm in self.store.norms(chunk, self._means[chunk])]

    def _apply(self, chunk: int, total: list[Sum], samples: int, now: float, factor: torch.Tensor | None = None) -> None:
        """Write the weights after this round to the next version's plane."""
        assert self.store is not None and self.planes is not None
        if self._target is None:
            self._target = self._take_plane()
        into, before = self.planes[self._target][chunk], self._weights_of(self._version, chunk)
        hypers = self._group_hypers(self.chunks[chunk])
        if self._drops or not samples:  # the new weights are the old ones
            total = [Sum(part.values, 0) for part in total[:1]]
        elif self._keeper is not None and factor is None:
            total, samples = [self.store.mean(chunk, total, samples)], 1
        if (keeper := self._keeper) is not None:
            mean = total[0]
            body = Replicate(self._version, chunk, mean.present, hypers, _number(factor))
            keeper.forward(body, [to_frame(mean.values)] if mean.present else [], now)
        try:
            frame = self.store.apply(chunk, total, samples, hypers, factor, into=into, before=before)
        except NotFinite as error:
            raise self._not_finite(str(error)) from None
        self._keep_frame(self._target, chunk, frame)
        self._moves(self._version + 1)
        self._next.add(chunk)
        failpoint("applying", self._version)

    def _not_finite(self, name: str) -> UsageError:
        """What to say of this round, in which the mean gradient of the tensor called `name` is not finite."""
        assert self.layout is not None
        text = f"the sum of the gradients of '{name}' in round {self._version} is not finite"
        for sender, push, sums in self._read:
            values = {chunk: one.values for chunk, one in zip(push.chunks, sums, strict=True)}
            if what := tensors_not_finite(self.layout, values):
                text = sentence(sender, what, push.round, push.lo, push.hi)
                break
        return UsageError(f"{text}; {ADVICE}")

    def _total(self, chunk: int) -> list[Any] | None:
        """The round's sum in `chunk`, or the two halves of it, once that is final, else None."""
        if self.policy.combines:
            sums = self._sums.get(chunk)
            return sums.parts if sums is not None and sums.complete else None
        if self._closed is None:
            return None
        leaves = self._leaves.get(chunk, {})
        if not leaves.keys() >= set(self._closed):
            return None
        return [fold({k: leaves[k] for k in self._closed}, self._count, self._adder(chunk))]

    def _weight(self) -> int:
        """What this round's sums are divided by for their mean, once that is final."""
        return sum(self._leaf_weights.values()) if self.policy.is_local else self._samples()

    def _samples(self) -> int:
        """Samples of this round's update, once that is final."""
        if self.policy.is_local:
            return sum(self._leaf_samples.values())
        plan = self.round_plan(self._version)
        ks = range(plan.micro_batches) if self._closed is None else self._closed
        return sum(plan.samples_in(k, k + 1) for k in ks)

    def _group_hypers(self, chunk: Chunk) -> dict[str, Any]:
        return self._hypers[chunk.group] if 0 <= chunk.group < len(self._hypers) else {}

    def _end(self, metrics: dict[str, float]) -> RoundReplicated:
        """What the books are to have of the round: only server 0 tells them."""
        if self.index:
            return RoundReplicated(self._version)
        rows = list(self._filed.values())
        if self._closed is not None:
            self._absent = set(range(self._count)) - {*self._closed, *(lo for lo, _ in self._filed)}
            rows = [row if row.lo in self._closed else _with_outcome(row, "dropped") for row in rows]
            rows += [self._row_of_absent(k) for k in sorted(self._absent)]
        if self._drops:
            rows, metrics = [_with_outcome(row, "dropped") for row in rows], {}
        committed = sum(row.micro_batches for row in rows if row.outcome == "committed")
        dropped = 0 if self._closed is None else self._count - len(self._closed)
        samples, dropped = (0, self._count) if self._drops else (self._samples(), dropped)
        round_ = Committed(self._version, samples, committed, dropped, metrics)
        return RoundReplicated(self._version, [round_], rows, max(self._reported_version, 0))

    def _row_of_absent(self, k: int) -> Contribution:
        samples = self.round_plan(self._version).samples_in(k, k + 1)
        return Contribution(self._version, k, k + 1, "", samples, 1, "dropped")

    def _book(self, filed: RoundReplicated) -> None:
        self._rounds += filed.rounds
        self._news += filed.contributions
        if self._neighbours is not None:
            self._neighbours.remember(filed)

    def _commit(self, ending: RoundReplicated) -> None:
        self._book(ending)
        # not of rounds that came back from a copy: what of them has come late since, may have been told already
        self._left_out |= {(ending.round, k) for k in self._absent}
        self._version += 1
        if self._target is not None:
            self._contents[self._target] = self._version
        else:  # a server without chunks, whose rows can be had one version back
            self._contents = {self._version % 2: self._version, (self._version - 1) % 2: self._version - 1}
        failpoint("applied", self._version)
        self._open_round()
        self._try_cut()
        self._have_kept()

    # ---- copies on other servers (ps/replication/primary_backup.py, ps/replication/manager.py)

    def _have_kept(self) -> None:
        """Have a copy of this shard made, if there is to be one and none is there: at a border, for it starts from that."""
        if self._neighbours is None or self._neighbours.has_keeper or not self._at_border or not self._open or self.restoring:
            return
        holdings = self._holdings
        if holdings.settled:  # else this is tried again
            self._neighbours.begin(self._version, holdings.parts(self._seen), holdings.classifiers.pending)

    @property
    def _holdings(self) -> ShardState:
        assert self.store is not None and self.tables is not None and self.classifiers is not None
        return ShardState(self.store, self.tables, self.classifiers)

    @property
    def _keeper(self) -> ReplicationManager | None:
        """Who tells the server that keeps the copy of this shard, if there is one or one on its way."""
        return self._neighbours if self._neighbours is not None and self._neighbours.has_keeper else None

    def _may_update_classifiers(self) -> bool:
        return super()._may_update_classifiers() and (self._neighbours is None or not self._neighbours.reads_rows)

    def _may_change_rows(self) -> bool:
        """Whether nobody reads rows where they are."""
        self._awaits_copy = self._neighbours is not None and self._neighbours.reads_rows
        return not self._awaits_copy

    def _head(
        self, shard: int, version: int, parts: int, filed: list[RoundReplicated], pending: ReplicateLayers | None
    ) -> StateHeader:
        assert self._setup is not None
        return StateHeader(shard, version, parts, self._setup[0], list(self.segments), list(filed), pending)

    def _forwarded(self, now: float) -> list[Send]:
        return self._neighbours.due(now) if self._neighbours is not None else []

    @property
    def keeps(self) -> list[int]:
        return self._neighbours.keeps if self._neighbours is not None else []

    def about_copies(self, sender: str, body: AboutCopies, frames: Frames, now: float) -> list[Send]:
        if self._neighbours is None:
            return super().about_copies(sender, body, frames, now)
        effects = self._neighbours.handle(sender, body, frames)
        if self.restoring and (state := self._neighbours.returned()) is not None:
            self._return(state)
        return effects + self._go_on_closing(now) + self._forwarded(now)

    def _made_again(self, head: StateHeader) -> ShardState:
        """Be the shard whose state is on its way from the keeper."""
        self.segments = list(head.segments)
        self._set_up(KEEPER, head.setup)
        return self._holdings

    def _return(self, state: Incoming) -> None:
        """Go on from the state that has come of the keeper."""
        head = state.head
        try:
            self._holdings.arrived(state)
        except (KeyError, RuntimeError) as error:
            raise UsageError(f"the copy of server-{self.index}'s shard, which came back, does not fit it: {error}.") from None
        self._uninitialised.clear()
        self._source = Source(head.round, self.settings.servers, head.setup, state, {})
        self._resume(self._source)
        self._opened()
        for filed in head.replicated_rounds:
            self._book(filed)
        self._source, self.restoring, self._repeats = None, False, True
        log.info("has the copy of its shard, as of round %d", head.round)

    def changed(self, keeper: bool, kept: bool, now: float) -> list[Send]:
        if self._neighbours is not None:
            self._neighbours.changed(keeper, kept)
            self._have_kept()
        return self._go_on_closing(now)

    def _go_on_closing(self, now: float) -> list[Send]:
        """Go on with a round that waited for nothing but the keeper."""
        return self._advance(now) if self._ending is not None or self._awaits_copy else []

    @property
    def done(self) -> int:
        return super().done + (self._neighbours.done if self._neighbours is not None else 0)

    @property
    def busy(self) -> bool:
        return super().busy or (self._neighbours is not None and self._neighbours.busy)

    def work(self, now: float) -> list[Send]:
        if self._neighbours is not None:
            self._neighbours.work()
        effects = super().work(now)
        if self.classifiers is not None and self.classifiers.measured and self._own_norms is None:
            effects += self._advance(now)
        return effects

    # ---- weights

    def _serve(self, worker: str) -> list[Send]:
        waiter = self.waiters[worker]
        clock = waiter.pull.for_round
        if not self._open or clock > self._version + 1:
            return []
        if clock == self._version + 1:
            ready = self._ready(waiter)
            if waiter.pull.shared or waiter.pull.full_precision or self._target is None or not ready:
                return []
            coded = self._frames_for(waiter.pull, self._target)
            return self._weights(worker, clock, self._target, {i: self._weights_of(clock, i) for i in ready}, False, coded)
        plane = self._plane_of(clock)
        if plane < 0:
            del self.waiters[worker]
            return [Send(worker, VersionExpired(clock, self._version))]
        self._needs(waiter)
        if waiter.pull.full_precision and clock == self._version:
            assert self.store is not None
            masters = {chunk: self.store.master(chunk) for chunk in waiter.unsent}
            return self._weights(worker, clock, -1, masters, True, {})
        coded = self._frames_for(waiter.pull, plane)
        return self._weights(worker, clock, plane, {i: self._weights_of(clock, i) for i in waiter.unsent}, True, coded)

    def _ready(self, waiter: WaitingWorker) -> set[int]:
        """Chunks of the next version to send now: none before those that are needed sooner, for gradients come in the opposite
        order, and what comes last should be what the next forward can wait for. But rather than nothing one that is needed later,
        for an idle network costs more than to be late by one chunk."""
        soonest = sorted(waiter.unsent, key=lambda chunk: urgency(self.chunks[chunk]))
        in_order = set(itertools.takewhile(self._next.__contains__, soonest))
        if in_order or waiter.bytes_under_way:
            return in_order
        return set(itertools.islice(filter(self._next.__contains__, soonest), 1))

    def _frames_for(self, pull: Pull, plane: int) -> dict[int, memoryview]:
        """What to send instead of weights in `plane`, those of round `pull.clock`: changes only to who holds what they change."""
        if sends_changes(self.settings) and pull.held_version != pull.for_round - 1:
            return {}
        return self._coded.get(plane, {})


def _with_outcome(row: Contribution, outcome: Any) -> Contribution:
    return Contribution(row.round, row.lo, row.hi, row.worker, row.samples, row.micro_batches, outcome, row.staleness)


def _number(factor: torch.Tensor | None) -> float | None:
    return None if factor is None else float(factor)
