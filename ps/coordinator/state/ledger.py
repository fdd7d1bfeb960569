"""The books of a run: which rounds are applied everywhere, of which micro-batches, and what all servers must decide alike.

A state machine without a socket or a clock: it is told what servers and workers report and answers with messages and rows
for the event log. Invariants:

- a round is committed when every server that takes part has applied it, once, in order;
- in every committed round each micro-batch is in exactly one committed contribution, or dropped; where some servers have
  applied what others have dropped, that is told of too, as dropped in part;
- the decision on a round (which micro-batches, which norms) never changes once it is given. It is on no disk: a coordinator
  that takes over learns it from the servers that were told, before it can be asked by all to decide (`RoundReady`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from roundtable.common.config.batch_plan import Segment
from roundtable.common.config.settings import Settings
from roundtable.common.config.worker_facts import Fact, Told, difference
from roundtable.common.model.layout import Layout, make_layout
from roundtable.common.policies import Policy, load
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.commit import (
    AllNorms,
    CloseRound,
    Committed,
    Contribution,
    Mean,
    Norms,
    Report,
    ReportAck,
    RoundReady,
)
from roundtable.common.protocol.messages.session import Refused
from roundtable.common.protocol.messages.setup import PlanReply, Setup, SetupReply
from roundtable.common.runtime.errors import UsageError, WireError
from roundtable.ps import differences
from roundtable.ps.model_parts import sizes
from roundtable.ps.validation import check_file, check_setup

#: Decisions of how many rounds are kept for servers that ask again.
_REMEMBERED = 16


@dataclass
class Totals:
    """Counts over the run, as the summary has them."""

    rounds: int = 0
    samples: int = 0
    dropped: int = 0
    samples_dropped: int = 0
    micro_batches_committed: int = 0
    micro_batches_recomputed: int = 0
    duplicates_ignored: int = 0
    dropped_in_part: int = 0
    staleness: Counter[int] = field(default_factory=Counter)


class Reported(msgspec.Struct, frozen=True):
    """What a server has reported so far: the number of its newest report, and the version that it told."""

    seq: int
    version: int


@dataclass(frozen=True)
class Recent:
    """The mean of a metric over the samples of some of the newest rounds."""

    value: float
    rounds: range


class Ledger:
    """Takes reports; `new_rounds` and `new_contributions` collect rows for the event log until they are fetched."""

    def __init__(self, settings: Settings, policy: Policy) -> None:
        self.settings = settings
        self.layout: Layout | None = None
        self.setup: Setup | None = None
        self.segments: list[Segment] = []
        #: What the first worker has told that all are to have in common: with its Setup, and with each Plan.
        self.told: dict[str, Told] = {}
        self.totals = Totals()
        #: Rounds below are applied on every server that takes part.
        self.committed = 0
        self.new_rounds: list[Committed] = []
        self.new_contributions: list[Contribution] = []
        #: Workers of whose work something is in a round that a server has reported.
        self.contributors: set[str] = set()
        #: Sample-weighted sums of each metric by epoch, and the samples they are over.
        self._epoch_metrics: dict[int, dict[str, tuple[float, int]]] = {}
        #: The newest updates, and the rounds in each: of an epoch's worth of rounds, or one that has more.
        self._newest: deque[tuple[range, Committed]] = deque()
        self._policy = policy
        self.reported: dict[int, Reported] = {}
        #: Applied on server 0, not yet everywhere.
        self.pending: list[Committed] = []
        #: What servers have left out of rounds that are not committed.
        self.left_out: list[Contribution] = []
        self._arrived: dict[int, dict[int, list[int]]] = {}
        self._closed: dict[int, list[int]] = {}
        self._norms: dict[int, dict[int, list[tuple[int, int, float]]]] = {}
        self._all_norms: dict[int, AllNorms] = {}

    def go_on(self, settings: Settings) -> None:
        """Be the books of the same run with other settings, whose workers say anew what the model and the plan are."""
        self.settings, self._policy = settings, load(settings)
        self.layout = self.setup = None
        self.segments, self.told = [], {}
        self.pending, self.left_out, self.reported = [], [], {}
        self.contributors = set()

    # ---- what the run is

    def set_up(self, setup: Setup, who: str = "") -> Body:
        """The model of a worker, which is `who` to people."""
        facts, setup = setup.facts, msgspec.structs.replace(setup, facts=[])
        if self.setup is None:
            try:
                check_setup(setup)
                layout = make_layout(setup.tensors, self.settings.servers, setup.tables, setup.classifiers)
                check_file(setup.file, sizes(layout))
            except (UsageError, WireError) as error:
                return Refused("Setup", str(error))
            self.layout, self.setup = layout, setup
        elif setup != self.setup:
            return Refused("Setup", differences.of_setups(self.setup, self._owner("setup"), setup, who))
        reason = self._differs("setup", facts, who)
        return Refused("Setup", reason) if reason else SetupReply()

    def plan(self, segment: Segment, facts: Sequence[Fact] = (), who: str = "", may_define: bool = True) -> Body | None:
        """What a worker, which is `who` to people, is to know of the plan it asks for; None where that is new and another is to
        define it."""
        if segment.index == len(self.segments) and segment.follows(self.segments[-1] if self.segments else None):
            if not may_define:
                return None
            self.segments.append(segment)
        elif segment.index >= len(self.segments) or self.segments[segment.index] != segment:
            return Refused("Plan", differences.of_plans(self.segments, self._owner(f"plan {segment.index}"), segment, who))
        reason = self._differs(f"plan {segment.index}", facts, who)
        return Refused("Plan", reason) if reason else PlanReply(segment.index)

    def _differs(self, about: str, facts: Sequence[Fact], who: str) -> str:
        """A sentence on what a worker has not in common with the first one that told of it."""
        known = self.told.setdefault(about, Told(who, list(facts)))
        return difference(known, facts, who)

    def _owner(self, about: str) -> str:
        """The worker that all others are compared with."""
        return self.told[about].by if about in self.told and self.told[about].by else "the other workers"

    @property
    def planned(self) -> int:
        """Updates that the plans known so far come to."""
        return sum(self._policy.updates(segment) for segment in self.segments)

    @property
    def passes(self) -> int:
        """Epochs that the plans known so far begin."""
        return sum(segment.passes for segment in self.segments)

    @property
    def done(self) -> tuple[int, int]:
        """Rounds that are committed, and passes over a dataset that are complete."""
        rounds = epochs = first = 0
        for segment in self.segments:
            updates = self._policy.updates(segment)
            done = self._policy.rounds_in(segment, max(0, min(self.totals.rounds - first, updates)))
            rounds, epochs, first = rounds + done, epochs + done // segment.rounds_per_epoch, first + updates
        return rounds, epochs

    def segment_of(self, update: int) -> Segment | None:
        """The segment that update number `update` belongs to."""
        first = 0
        for segment in self.segments:
            if first <= update < first + self._policy.updates(segment):
                return segment
            first += self._policy.updates(segment)
        return None

    def epoch_of(self, update: int) -> int:
        """The epoch in which the data of an update begin."""
        segment = self.segment_of(update)
        return 0 if segment is None else segment.round(self._rounds_of(segment, update)[0]).epoch

    def _rounds_of(self, segment: Segment, update: int) -> range:
        """The rounds that an update of `segment` is made of."""
        number = update - sum(self._policy.updates(earlier) for earlier in self.segments[: segment.index])
        begin, end = (segment.first_round + self._policy.rounds_in(segment, n) for n in (number, number + 1))
        return range(begin, end)

    def micro_batches(self, round_: int) -> int:
        """K of a round; 0 where no plan knows it."""
        for segment in self.segments:
            if segment.first_round <= round_ < segment.end:
                return segment.round(round_).micro_batches
        return 0

    # ---- what servers report

    def report(self, server: int, report: Report) -> Body:
        """News of a server, counted once however often it is sent."""
        if any(self.segment_of(t) is None for t in [row.round for row in report.rounds] + [row.round for row in report.dropped]):
            raise WireError(f"server-{server} reports updates that no plan knows")
        before = self.reported.get(server, Reported(-1, 0))
        if report.seq > before.seq:
            self.reported[server] = Reported(report.seq, max(report.version, before.version))
            first = self.pending[-1].round + 1 if self.pending else self.committed
            first = first if report.may_repeat else 0  # of those before, this was told already
            self.pending += [row for row in report.rounds if row.round >= first]
            contributions = [row for row in report.contributions if row.round >= first]
            self.new_contributions += contributions
            for row in contributions:
                self.contributors.add(row.worker)
                self.count(row.outcome, row.staleness, 1, row.micro_batches)
            self.left_out += [row for row in report.dropped if row.round >= self.committed]
            self._commit()
        return ReportAck(report.seq)

    def replaced(self, server: int) -> None:
        """Another process is in the place of a server, which counts its reports anew."""
        if server in self.reported:
            self.reported[server] = Reported(-1, self.reported[server].version)

    def count(self, outcome: str, staleness: int | None, contributions: int, micro_batches: int) -> None:
        """Count so many contributions with one outcome, of so many micro-batches altogether."""
        if outcome == "committed":
            self.totals.micro_batches_committed += micro_batches
            if staleness is not None:
                self.totals.staleness[staleness] += contributions
        elif outcome == "duplicate":
            self.totals.duplicates_ignored += contributions
            self.totals.micro_batches_recomputed += micro_batches
        elif outcome == "dropped in part":
            self.totals.dropped_in_part += micro_batches

    def _commit(self) -> None:
        owners = self.layout.owners() if self.layout else [0]
        everywhere = min(self.reported[owner].version if owner in self.reported else 0 for owner in owners)
        while self.pending and self.pending[0].round < everywhere:
            row = self.pending.pop(0)
            self._compare(row.round, len(owners))
            self.book(row)
            self.new_rounds.append(row)

    def _compare(self, round_: int, servers: int) -> None:
        """Find the micro-batches of a round that not all servers have dropped whole, though some have."""
        by_micro_batch: dict[int, list[Contribution]] = {}
        for row in self.left_out:
            if row.round == round_:
                by_micro_batch.setdefault(row.lo, []).append(row)
        for rows in by_micro_batch.values():
            if [row.outcome for row in rows] != ["dropped"] * servers:
                self.count("dropped in part", None, 1, 1)
                self.new_contributions.append(msgspec.structs.replace(rows[0], outcome="dropped in part"))
        self.left_out = [row for row in self.left_out if row.round > round_]

    def book(self, row: Committed) -> None:
        """Count a round that is applied everywhere, the next one after those before."""
        self.committed = row.round + 1
        self.totals.rounds += 1
        self.totals.samples += row.samples
        self.totals.dropped += row.dropped
        if row.dropped:
            segment = self.segment_of(row.round)
            assert segment is not None
            self.totals.samples_dropped += segment.round(row.round).samples - row.samples
        self._average(row)

    def _average(self, row: Committed) -> None:
        metrics = self._epoch_metrics.setdefault(self.epoch_of(row.round), {})
        for name, value in row.metrics.items():
            total, samples = metrics.get(name, (0.0, 0))
            metrics[name] = total + value * row.samples, samples + row.samples
        segment = self.segment_of(row.round)
        if segment is None:
            return
        rounds = self._rounds_of(segment, row.round)
        if self._policy.contributes == "weights":  # see LocalSgdLoop._keep
            rounds = rounds[-segment.rounds_per_epoch :]
        self._newest.append((rounds, row))
        while len(self._newest) > 1 and rounds.stop - self._newest[1][0].start >= segment.rounds_per_epoch:
            self._newest.popleft()

    def mean(self, ask: Mean) -> Mean:
        """The mean of a metric over the samples of an epoch, as far as its rounds are committed."""
        total, samples = self._epoch_metrics.get(ask.epoch, {}).get(ask.name, (0.0, 0))
        complete = self.committed >= self.planned or self.epoch_of(self.committed) > ask.epoch
        return Mean(ask.epoch, ask.name, total / samples if samples else None, complete)

    def recent(self, name: str) -> Recent | None:
        """Mean of a metric over the newest rounds, as many as an epoch has, or those of the newest update if that has more."""
        having = [(rounds, row) for rounds, row in self._newest if name in row.metrics and row.samples]
        samples = sum(row.samples for _, row in having)
        if not samples:
            return None
        total = sum(row.metrics[name] * row.samples for _, row in having)
        return Recent(total / samples, range(having[0][0].start, having[-1][0].stop))

    # ---- what all servers must decide alike

    def arrived(self, server: int, message: RoundReady) -> list[tuple[int, Body]]:
        """`backup`: close the round when enough micro-batches are in everywhere. Answers are (server, message)."""
        if message.round in self._closed:
            return [(server, CloseRound(message.round, self._closed[message.round]))]
        count = self.micro_batches(message.round)
        if self.layout is None or not all(k < count for k in message.micro_batches):
            return []
        sets = self._arrived.setdefault(message.round, {})
        sets[server] = message.micro_batches
        owners = self.layout.owners()
        everywhere = set.intersection(*(set(sets.get(owner, ())) for owner in owners))
        if not count or len(everywhere) < max(1, count - self._policy.may_leave_out):
            return []
        return self.decided(CloseRound(message.round, sorted(everywhere)))

    def norms(self, server: int, message: Norms) -> list[tuple[int, Body]]:
        """Clipping: hand out all norms of a round when every server that holds any part of the model has sent its own."""
        if self.layout is None or self.segment_of(message.round) is None:
            return []
        if message.round in self._all_norms:
            return [(server, self._all_norms[message.round])]
        parts = self._norms.setdefault(message.round, {})
        parts.setdefault(server, message.norms)
        _forget(self._norms)
        owners = {chunk.server for chunk in self.layout.chunks}
        if self.layout.tables or self.layout.classifiers:
            owners.update(self.layout.owners())
        if not owners <= parts.keys():
            return []
        return self.decided(AllNorms(message.round, sorted(norm for part in parts.values() for norm in part)))

    def decided(self, decision: CloseRound | AllNorms) -> list[tuple[int, Body]]:
        """This is decided, here or by a coordinator before this one: tell all servers."""
        if isinstance(decision, CloseRound):
            self._closed[decision.round] = decision.micro_batches
            self._arrived.pop(decision.round, None)
            _forget(self._closed)
        else:
            self._all_norms[decision.round] = decision
            self._norms.pop(decision.round, None)
            _forget(self._all_norms)
        return [(owner, decision) for owner in self.layout.owners()] if self.layout is not None else []


def _forget(decisions: dict[int, Any]) -> None:
    for round_ in sorted(decisions)[:-_REMEMBERED]:
        del decisions[round_]
