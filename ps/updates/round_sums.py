"""The contributions to the open round that have arrived, and their sums."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from roundtable.common.config.batch_plan import Round
from roundtable.common.config.weights import weight_if_given
from roundtable.common.model.layout import Chunk, Layout
from roundtable.common.model.metrics import Metrics, mean_metrics
from roundtable.common.model.nonfinite import ADVICE, sentence, tensors_not_finite
from roundtable.common.model.partial_sum import Sum
from roundtable.common.model.reduction_tree import Span, TreeSum, fold
from roundtable.common.policies import Policy
from roundtable.common.protocol.messages.commit import Committed, Contribution
from roundtable.common.protocol.messages.embedding import RowPush
from roundtable.common.protocol.messages.gradients import Push, Schedules, UsedSettings
from roundtable.common.protocol.messages.setup import Update
from roundtable.common.protocol.messages.sharded import LayerPush
from roundtable.common.runtime.errors import UsageError
from roundtable.ps.params.clipping import Norm
from roundtable.ps.params.planned_rates import of_group
from roundtable.ps.shard.kinds import WEIGHTS
from roundtable.ps.shard.model import ShardModel
from roundtable.ps.shard.shard import contribution
from roundtable.ps.updates.settings_of_round import check_same

#: Returns the sum of two contributions, left + right.
Adder = Callable[[Any, Any], Any]


class RoundSums:
    """The contributions to one round by number: a chunk's id, or a number of `ps/shard/kinds.py`.

    Contributions are added as they come. If the policy may leave some out, they are kept apart until the coordinator has decided.
    """

    def __init__(
        self, round_: int, policy: Policy, workers: int, plan: Callable[[], Round], adder: Callable[[int], Adder]
    ) -> None:
        self.round = round_
        self._policy, self._workers, self._find_plan, self._adder = policy, workers, plan, adder
        #: By number: the sum so far, if contributions are added as they come.
        self._sums: dict[int, TreeSum[Any]] = {}
        #: By number and micro-batch: contributions, if they are kept apart.
        self._leaves: dict[int, dict[int, Any]] = {}
        #: By span of micro-batches: the row for the ledger of each contribution.
        self._rows: dict[Span, Contribution] = {}
        #: Contributions that lie in workers' memory. Nobody has checked them for values that are not finite.
        self.in_memory: list[tuple[str, Push, Sequence[Sum]]] = []
        #: The samples of each leaf. The plan does not know them if workers step locally.
        self._leaf_samples: dict[int, int] = {}
        #: By parameter group: the optimizer's settings for this round.
        self.hypers: list[dict[str, Any]] = []
        #: The worker whose push had them; '' before the first push.
        self._settled_by = ""
        #: The script's schedulers, if a push had them.
        self._schedules: Schedules | None = None
        #: First micro-batches of contributions that are not finite.
        self._not_finite: set[int] = set()
        #: Policy `backup`: the micro-batches to apply, once decided.
        self.decided: list[int] | None = None
        #: Clipping: the norms of this server's part of the mean gradient, once known.
        self.own_norms: list[Norm] | None = None
        #: Clipping: the norms of all servers' parts, once known.
        self.norms: list[Norm] | None = None
        #: Clipping, by chunk: mean contributions that are final and wait for `norms`.
        self.means: dict[int, Sum] = {}
        #: Numbers of the chunks and kinds that are applied.
        self.applied: set[int] = set()

    @functools.cached_property
    def _plan(self) -> Round:
        """Return the plan of this round. Raises WireError if no segment has the round."""
        return self._find_plan()

    @property
    def count(self) -> int:
        """Return the number of leaves of this round's reduction tree: micro-batches, or workers if they step locally."""
        return self._workers if self._policy.is_local else self._plan.micro_batches

    @property
    def drops(self) -> bool:
        """Return True if a contribution that counts is not finite. Then all servers drop the round: each message says so."""
        return bool(self._not_finite if self.decided is None else self._not_finite & set(self.decided))

    # ---- contributions

    def add(self, number: int, push: Push | RowPush | LayerPush, value: Any) -> bool:
        """Add a contribution. Return False if it does not count because others came before."""
        counts = self._file(number, (push.lo, push.hi), value)
        if counts and not push.finite:
            self._not_finite.add(push.lo)
        return counts

    def _file(self, number: int, span: Span, value: Any) -> bool:
        if not self._policy.combines:
            return self._leaves.setdefault(number, {}).setdefault(span[0], value) is value
        if number not in self._sums:
            self._sums[number] = TreeSum(self.count, self._adder(number), joins_root=number < 0)
        return self._sums[number].file(span, value)

    def describe(self, push: Push | RowPush | LayerPush) -> None:
        """Record the number of samples and the weight of a push."""
        self._leaf_samples.setdefault(push.lo, push.samples)
        self._file(WEIGHTS, (push.lo, push.hi), push.total_weight)

    def account(self, sender: str, push: Push, counts: bool) -> list[Contribution]:
        """Record a push for the ledger, so that each micro-batch is in one committed row. Return the rows that are duplicates."""
        if not counts:
            return [contribution(sender, push, "duplicate")]
        inside = [s for s in self._rows if push.lo <= s[0] and s[1] <= push.hi] if push.hi - push.lo > 1 else []
        replaced = [msgspec.structs.replace(self._rows.pop(span), outcome="duplicate") for span in inside]
        self._rows[push.lo, push.hi] = contribution(sender, push, "committed")
        return replaced

    # ---- arrived and missing

    def missing(self, numbers: Sequence[int]) -> list[int]:
        """Return the micro-batches of which a part in `numbers` has not arrived."""
        everything = set(range(self.count))
        absent: set[int] = set()
        for number in numbers:
            if not self._policy.combines:
                absent |= everything - set(self._leaves.get(number, ()))
            elif number not in self.applied and number not in self.means:
                absent |= set(self._sums[number].missing()) if number in self._sums else everything
        return sorted(absent)

    def arrived(self, numbers: Sequence[int]) -> list[int]:
        """Return the micro-batches that have arrived in full, or an empty list while they are too few to close the round."""
        each = [self._leaves.get(number, {}).keys() for number in numbers]
        fewest = min(map(len, each), default=0)
        if not fewest or fewest < self.count - self._policy.may_leave_out:
            return []
        return sorted(set.intersection(*map(set, each)))

    def total(self, number: int, others: Sequence[int] = ()) -> list[Any] | None:
        """Return the round's sum in a list, or its two halves, once final, else None. Those of `others` must be final as well."""
        if any(self.total(other) is None for other in others):
            return None
        if self._policy.combines:
            sums = self._sums.get(number)
            return sums.parts if sums is not None and sums.complete else None
        if self.decided is None:
            return None
        leaves = self._leaves.get(number, {})
        if not leaves.keys() >= set(self.decided):
            return None
        return [fold({k: leaves[k] for k in self.decided}, self.count, self._adder(number))]

    def weight(self) -> float:
        """Return the divisor that makes a mean of a sum. It is final as soon as any sum is.

        It has the same bits on all servers: each push has its weight with it, and weights are added along the tree.
        """
        total = self.total(WEIGHTS)
        assert total is not None
        return float(total[0])

    @property
    def moves(self) -> bool:
        """Return False if the round leaves parameters as they are: it is dropped, or its weight is 0."""
        return not self.drops and self.total(WEIGHTS) not in ([0.0], [0])

    def samples(self) -> int:
        """Return the number of samples in this round's update. Final once the sums are."""
        if self._policy.is_local:
            return sum(self._leaf_samples.values())
        if self.decided is None:
            return self._plan.samples
        return sum(self._plan.samples_in(k, k + 1) for k in self.decided)

    def settle(self, sender: str, push: Push | RowPush | LayerPush, update: Update) -> None:
        """Take the settings of a push. Raises UsageError if another push to this round had others."""
        if not self._settled_by:
            self._settled_by, self.hypers = sender, push.hypers
        elif push.hypers != self.hypers:
            check_same(self.round, update, (self._settled_by, self.hypers), (sender, push.hypers))
        if isinstance(push, Push) and push.schedules is not None and (self._schedules is None or push.schedules.steps_after):
            self._schedules = push.schedules

    @property
    def settings(self) -> UsedSettings | None:
        """The settings of this round; None if they are those of `Setup`, and the script has no schedulers."""
        if not self.hypers and self._schedules is None:
            return None
        return UsedSettings(self.round, self.hypers, self._schedules)

    def hypers_of(self, chunk: Chunk) -> dict[str, Any]:
        """Return the optimizer's settings for a chunk's parameter group."""
        return of_group(self.hypers, chunk.group)

    def not_finite(self, name: str, layout: Layout) -> UsageError:
        """Return the error for a mean gradient of the tensor `name` that is not finite. It names a worker if one is to blame."""
        text = f"the sum of the gradients of '{name}' in round {self.round} is not finite"
        for sender, push, sums in self.in_memory:
            values = {chunk: one.values for chunk, one in zip(push.chunks, sums, strict=True)}
            if what := tensors_not_finite(layout, values):
                text = sentence(sender, what, push.round, push.lo, push.hi)
                break
        return UsageError(f"{text}; {ADVICE}")

    # ---- the ledger

    @property
    def left_out(self) -> set[int]:
        """Return the micro-batches that do not count and have not arrived."""
        if self.decided is None:
            return set()
        return set(range(self.count)) - {*self.decided, *(lo for lo, _ in self._rows)}

    def entry(self, metrics: Metrics) -> tuple[Committed, list[Contribution]]:
        """Return the round's entry for the ledger, and the rows of its contributions."""
        rows, means = list(self._rows.values()), mean_metrics(metrics)
        if self.decided is not None:
            rows = [row if row.lo in self.decided else msgspec.structs.replace(row, outcome="dropped") for row in rows]
            rows += [self._row_of_absent(k) for k in sorted(self.left_out)]
        if self.drops:
            rows, means = [msgspec.structs.replace(row, outcome="dropped") for row in rows], {}
        committed = sum(row.micro_batches for row in rows if row.outcome == "committed")
        dropped = 0 if self.decided is None else self.count - len(self.decided)
        samples, dropped = (0, self.count) if self.drops else (self.samples(), dropped)
        has_own = not self.drops and self._policy.contributes != "weights"
        told = weight_if_given(self.weight(), samples) if has_own else None
        return Committed(self.round, samples, committed, dropped, means, told), rows

    def _row_of_absent(self, k: int) -> Contribution:
        return Contribution(self.round, k, k + 1, "", self._plan.samples_in(k, k + 1), 1, "dropped")

    def measure(self, model: ShardModel) -> list[Norm] | None:
        """Return the norms of this server's part of the round's mean gradient.

        Return None while a sum is not final, or while sharded layers compute their norms, which takes long.
        """
        totals = [self.total(kind.number) for kind in model.kinds]
        if len(self.means) < len(model.chunks) or None in totals or not (model.chunks or totals):
            return None
        found: list[Norm] = []
        for kind, total in reversed(list(zip(model.kinds, totals, strict=True))):
            norms = kind.norms(total[0], self.weight()) if total is not None else None
            if norms is None:
                return None
            found += norms
        return found + [norm for chunk in model.chunks for norm in model.dense.norms(chunk, self.means[chunk])]
