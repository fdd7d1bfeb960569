"""A shard that applies contributions once per round, under `sync`, `backup`, `local` and `average`."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from roundtable.common.model.metrics import add_metrics
from roundtable.common.model.partial_sum import Sum, is_mean
from roundtable.common.model.tensor_bytes import to_frame
from roundtable.common.protocol.effects import Send
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.commit import AllNorms, CloseRound, Norms, RoundReady
from roundtable.common.protocol.messages.gradients import Push
from roundtable.common.protocol.messages.replication import Replicate, RoundReplicated
from roundtable.common.protocol.transport import Frames
from roundtable.common.runtime.errors import WireError
from roundtable.common.runtime.failpoints import failpoint
from roundtable.ps.params.clipping import value_of
from roundtable.ps.params.dense import NotFinite
from roundtable.ps.replication.manager import ReplicationManager
from roundtable.ps.shard.checkpoint_writer import Source
from roundtable.ps.shard.kinds import METRICS, WEIGHTS, ParameterKind
from roundtable.ps.shard.model import ShardModel
from roundtable.ps.shard.shard import Shard, ShardParts, contribution
from roundtable.ps.updates.round_decisions import RoundDecisions
from roundtable.ps.updates.round_serving import RoundServing
from roundtable.ps.updates.round_sums import Adder, RoundSums
from roundtable.ps.updates.weight_versions import WeightVersions

log = logging.getLogger("roundtable.ps.shard")


class SyncShard(Shard):
    """A shard whose updates are rounds. Round t is open while the version is t.

    Each chunk is applied as soon as its sum is final. Its new weights go to another weight buffer, and at once to workers that
    wait for W(t+1). The round closes when all chunks are applied and the backup, if there is one, has all of the round.
    """

    def __init__(self, parts: ShardParts, model: ShardModel, replication: ReplicationManager | None) -> None:
        super().__init__(parts, model)
        self.versions = WeightVersions(model, self._settings, self.sender.readers)
        self._serving = RoundServing(model, self.versions, self.sender)
        #: Replication, or None in a run without replicas.
        self._replication = replication
        self._decisions = RoundDecisions()
        #: Policy `backup`, on server 0: (round, micro-batch) that closed rounds left out and no worker has sent.
        self._left_out: set[tuple[int, int]] = set()
        self._kinds = {kind.number: kind for kind in model.kinds}
        self._open_round()

    def _open_round(self) -> None:
        round_ = self.version
        self.round = RoundSums(round_, self._policy, self._settings.workers, lambda: self._plans.round(round_), self._adder)
        self._decisions.begin_round()
        #: The round's entry for the ledger, once all of the round is applied.
        self._ending: RoundReplicated | None = None
        #: On server 0: micro-batches that do not count and had not arrived when the round was applied.
        self._absent: set[int] = set()
        #: True if an update of embedding rows waits until their state has arrived at the backup.
        self._awaits_backup = False

    def _adder(self, number: int) -> Adder:
        if number == METRICS:
            return add_metrics
        if number == WEIGHTS:
            return operator.add
        return self._kinds[number].add if number in self._kinds else self.model.dense.adder(number)

    @property
    def version(self) -> int:
        return self.versions.newest

    def missing(self) -> list[int]:
        if self._policy.is_local or not self.model.is_open or not self._plans.has(self.version):
            return []
        return self.round.missing(self.model.ids)

    @property
    def first_not_begun(self) -> int:
        return self.version + (bool(self.round.applied) or self._ending is not None)

    @property
    def at_border(self) -> bool:
        return not self.round.applied

    @property
    def seen(self) -> Mapping[int, torch.Tensor]:
        return {chunk: self.versions.of(self.version, chunk) for chunk in self.model.chunks}

    def extra(self) -> dict[str, Any]:
        return self.sender.settings.of_checkpoint(self.version)

    def resume(self, source: Source) -> None:
        self.versions.resume(source.round)
        self.sender.settings.resume(source.extra.get(self._index, {}))
        self._open_round()

    def opened(self, source: Source | None) -> None:
        self.versions.place(source)
        self.begin_backup()

    def serve(self, worker: str) -> list[Send]:
        return self._serving.serve(worker, self.round.applied)

    # ---- contributions

    def push(self, sender: str, push: Push, values: Callable[[], Sequence[Sum]], now: float) -> list[Send]:
        if push.round > self.version:
            raise WireError(f"{sender} pushed for round {push.round} while round {self.version} is open")
        accounts = push.metrics is not None and self._index == 0
        if push.round < self.version:
            if accounts:
                late = (push.round, push.lo) in self._left_out
                self._left_out.discard((push.round, push.lo))
                self._reports.contributions.append(contribution(sender, push, "late" if late else "duplicate"))
            return [self._ack(sender, push)]
        found = values()
        self._check_apart(sender, push)
        if push.gradient_buffer >= 0:
            self.round.in_memory.append((sender, push, found))
        for chunk, value in zip(push.chunks, found, strict=True):
            if self.round.add(chunk, push, value):
                self._counts(sender, push, chunk)
        if accounts:
            counts = self.round.add(METRICS, push, push.metrics)
            self._reports.contributions += self.round.account(sender, push, counts)
        failpoint("aggregating", push.round)
        self.round.describe(push)
        if not self._policy.is_local and push.gradient_buffer >= 0:
            self.sender.readers.uses(sender, self.versions.buffer_of(self.version))
        self.round.settle(sender, push, self.model.setup.update)
        return [self._ack(sender, push), *self._advance(now)]

    def push_kind(self, kind: ParameterKind, sender: str, push: Any, frames: Frames, now: float) -> list[Send]:
        if push.round > self.version:
            raise WireError(f"{sender} pushed {kind.noun} for round {push.round} while round {self.version} is open")
        ack = Send(sender, kind.ack(push))
        if push.round < self.version or (kind.number in self.round.applied and not kind.changes_at_once):
            return [ack]  # the push's questions to sharded layers may be forgotten, so do not read it
        value = self._validator.of_kind(kind, sender, push, frames, self._plans.round(push.round))
        self._check_apart(sender, push)
        self.round.add(kind.number, push, value)
        self.round.describe(push)
        self.round.settle(sender, push, self.model.setup.update)
        return [ack, *self._advance(now)]

    def _check_apart(self, sender: str, push: Any) -> None:
        """Raise WireError if the push is a sum and the policy may leave out a part of it."""
        if not self._policy.combines and push.hi - push.lo > 1:
            raise WireError(f"{sender} pushed a sum of micro-batches, which policy {self._settings.policy} cannot take apart")

    # ---- decisions that all servers share

    def decide(self, body: Body, now: float) -> list[Send]:
        match body:
            case RoundReady() | Norms():  # another server's question: repeat the decision if this server knows it
                return self._decisions.repeat(body)
            case CloseRound() | AllNorms() if body.round != self.version or not self.model.is_open:
                return []
            case CloseRound():
                if not (body.micro_batches and set(body.micro_batches) <= set(range(self.round.count))):
                    raise WireError(f"round {body.round} cannot be closed with micro-batches {body.micro_batches[:20]}")
                self._decisions.remember(body)
                self.round.decided = body.micro_batches
            case AllNorms():
                self._decisions.remember(body)
                self.round.norms = body.norms
            case _:
                raise WireError(f"a server has no use for {type(body).__name__}")
        return self._advance(now)

    def tick(self, now: float) -> list[Send]:
        self.begin_backup()
        return self._decisions.ask(None if self._plans.is_held(self.version) else self._question(), now)

    def _question(self) -> RoundReady | Norms | None:
        """Return the question to the coordinator whose answer the round waits for, or None."""
        round_ = self.round
        if not self._policy.combines and round_.decided is None:
            arrived = round_.arrived(self.model.ids)
            return RoundReady(self.version, arrived, self._context.coordinator()) if arrived else None
        if round_.own_norms is not None and round_.norms is None:
            return Norms(self.version, round_.own_norms, self._context.coordinator())
        return None

    # ---- applying

    def _advance(self, now: float) -> list[Send]:
        """Apply the final sums, and close the round if everything is applied. Return the messages to send."""
        if self._plans.is_held(self.version):
            return self._replicated(now)
        round_, before = self.round, (self.version, len(self.round.applied))
        clipping = self.model.dense.clipping
        clips = clipping.clips and round_.moves
        self._take_totals(clips, now)
        if clips and round_.own_norms is None:
            round_.own_norms = round_.measure(self.model)
        if not clips or round_.norms is not None:
            factor = clipping.factor(round_.norms) if clips and round_.norms is not None else None
            for chunk in list(round_.means):
                self._apply(chunk, [round_.means.pop(chunk)], 1, now, factor)
                self._progress.step()
            for kind in self.model.kinds:
                self._close_kind(kind, factor, now)
        self._try_to_end(now)
        news = before != (self.version, len(self.round.applied))
        return self._replicated(now) + self._decisions.ask(self._question(), now) + (self.serve_all() if news else [])

    def _take_totals(self, clips: bool, now: float) -> None:
        """Apply each chunk whose sum is final. With clipping, only take the mean, which waits for the norms."""
        round_, others = self.round, self.model.others
        for chunk in self.model.chunks:
            if chunk in round_.applied or chunk in round_.means or (total := round_.total(chunk, others[chunk])) is None:
                continue
            if clips:
                round_.means[chunk] = self.model.dense.mean(chunk, total, round_.weight())
            else:
                self._apply(chunk, total, round_.weight(), now)
            self._progress.step()

    def _apply(self, chunk: int, total: list[Sum], weight: float, now: float, factor: torch.Tensor | None = None) -> None:
        """Apply a chunk's sum: write its new weights to the next version's weight buffer, and forward its mean to the backup."""
        dense, backup = self.model.dense, self._backup
        into, before = self.versions.next_of(chunk), self.versions.of(self.version, chunk)
        hypers = self.round.hypers_of(self.model.chunks[chunk])
        has_mean = weight or not is_mean(self.model.chunks[chunk].kind)
        if self.round.drops or not has_mean:  # without values, the new weights are the old ones
            total = [Sum(part.values, 0) for part in total[:1]]
        elif backup is not None and factor is None:
            total, weight = [dense.mean(chunk, total, weight)], 1.0
        if backup is not None:
            mean = total[0]
            body = Replicate(self.version, chunk, mean.present, hypers, value_of(factor))
            backup.forward(body, [to_frame(mean.values)] if mean.present else [], now)
        try:
            frame = dense.apply(chunk, total, weight, hypers, factor, into=into, before=before)
        except NotFinite as error:
            raise self.round.not_finite(str(error), self.model.layout) from None
        self.versions.written(chunk, frame)
        self.round.applied.add(chunk)
        failpoint("applying", self.version)

    def _close_kind(self, kind: ParameterKind, factor: torch.Tensor | None, now: float) -> None:
        """Update the parameters of `kind` if the round's contributions to them are complete."""
        round_ = self.round
        if kind.number in round_.applied or (total := round_.total(kind.number)) is None:
            return
        if kind.changes_at_once:
            self._awaits_backup = self._replication is not None and self._replication.reads_rows
            if self._awaits_backup:
                return
        counted, weight = total[0] if round_.moves else kind.nothing(), round_.weight()
        if (backup := self._backup) is not None:
            backup.forward(*kind.replicated(self.version, counted, weight, round_.hypers, factor), now)
        kind.close(counted, weight, round_.hypers, factor)
        round_.applied.add(kind.number)

    # ---- the end of a round

    def _try_to_end(self, now: float) -> None:
        """Close the round if all of it is applied and the backup, if there is one, has all of it."""
        metrics = self.round.total(METRICS) if self._index == 0 else [{}]
        if metrics is None or not self.round.applied >= set(self.model.ids) - {METRICS}:
            return
        if self._ending is None:
            self._ending = self._end(metrics[0])
            if self._replication is not None:
                self._replication.forward(self._ending, (), now)
        if self._replication is None or self._replication.may_close(self.version):
            self._commit(self._ending)

    def _end(self, metrics: dict[str, tuple[float, float]]) -> RoundReplicated:
        """Return the round's entry for the ledger. Only server 0 fills it in."""
        if self._index:
            return RoundReplicated(self.version)
        committed, rows = self.round.entry(metrics)
        self._absent = self.round.left_out
        reported = max(self._reports.reported_version, 0)
        return RoundReplicated(self.version, [committed], rows, reported, self.round.settings)

    def book(self, ending: RoundReplicated) -> None:
        """Queue the report of a closed round."""
        self._reports.rounds += ending.rounds
        self._reports.contributions += ending.contributions
        self.sender.settings.remember(ending.settings)
        if self._replication is not None:
            self._replication.remember(ending)

    def _commit(self, ending: RoundReplicated) -> None:
        self.book(ending)
        # rounds that came back from a backup add nothing: their late contributions may have been reported already
        self._left_out |= {(ending.round, k) for k in self._absent}
        self.versions.commit()
        failpoint("applied", self.version)
        self._open_round()
        self._checkpoint.round_closed(self)
        self.begin_backup()

    # ---- the backup of this shard (ps/replication/manager.py)

    def begin_backup(self) -> None:
        """Start to send the shard's state to its backup, if the run has replicas and the backup has no copy.

        Only at a border: the copy starts from the state between two rounds.
        """
        replication, model = self._replication, self.model
        if replication is None or replication.has_backup or not self.at_border or not model.is_open:
            return
        if model.state.is_between_rounds:  # if not, `tick` tries again
            replication.begin(model.setup, self.version, model.state.parts(self.seen), model.layers.pending)

    @property
    def _backup(self) -> ReplicationManager | None:
        """Return the replication manager if the backup has a copy, or one on its way to it, else None."""
        return self._replication if self._replication is not None and self._replication.has_backup else None

    def _may_update_layers(self) -> bool:
        return super()._may_update_layers() and (self._replication is None or not self._replication.reads_rows)

    def _replicated(self, now: float) -> list[Send]:
        return self._replication.due(now) if self._replication is not None else []

    def go_on(self, now: float) -> list[Send]:
        """Continue a round that waited only for the backup. Return the messages to send."""
        return self._advance(now) if self._ending is not None or self._awaits_backup else []

    def released(self, now: float) -> list[Send]:
        return self._advance(now) if self.model.is_open and self._plans.has(self.version) else []

    def work(self, now: float) -> list[Send]:
        return self._advance(now) if self.model.layers.measured and self.round.own_norms is None else []
