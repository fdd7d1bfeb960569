"""The ledger of a run: which rounds all servers have applied, and which contributions count in them.

`Ledger` is a state machine without a socket or a clock. It takes reports of servers and models and plans of workers. It answers
with messages and with rows for the event log. Invariants:

- a round is committed when every server that takes part has applied it, once, in order;
- in every committed round each micro-batch is in exactly one committed contribution, or dropped; if some servers have applied
  a micro-batch that others have dropped, the ledger has a row "dropped in part" as well.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from roundtable.common.config.batch_plan import Segment
from roundtable.common.config.settings import Settings
from roundtable.common.config.worker_facts import Fact, FirstFacts, difference
from roundtable.common.model.layout import Layout, make_layout
from roundtable.common.policies import Policy, load
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.commit import (
    Committed,
    Contribution,
    Mean,
    Report,
    ReportAck,
)
from roundtable.common.protocol.messages.session import CollectiveOutcome, Past, Refused
from roundtable.common.protocol.messages.setup import PlanReply, Setup, SetupReply
from roundtable.common.runtime.errors import UsageError, WireError
from roundtable.ps import differences
from roundtable.ps.model_parts import sizes
from roundtable.ps.validation import check_file, check_setup


@dataclass
class Totals:
    """Counts over the run, for the summary."""

    #: Committed updates.
    rounds: int = 0
    #: Samples in committed updates.
    samples: int = 0
    #: Dropped micro-batches.
    dropped: int = 0
    #: Samples of dropped micro-batches.
    samples_dropped: int = 0
    micro_batches_committed: int = 0
    #: Micro-batches in duplicate contributions, and of rounds that were rolled back.
    micro_batches_recomputed: int = 0
    #: Duplicate contributions.
    duplicates_ignored: int = 0
    #: Micro-batches that some servers have dropped and others have applied.
    dropped_in_part: int = 0
    #: By staleness: committed contributions.
    staleness: Counter[int] = field(default_factory=Counter)


class Reported(msgspec.Struct, frozen=True):
    """The number of a server's newest report, and the version of its weights."""

    seq: int
    version: int


@dataclass(frozen=True)
class Recent:
    """The weighted mean of a metric over some of the newest rounds."""

    value: float
    rounds: range


class RunEnd(msgspec.Struct, frozen=True):
    """The end of the run that a script has asked for."""

    #: The first worker that asked, and its reason.
    worker: str
    reason: str
    #: The run has at least so many updates.
    at_least: int
    #: The run ends after so many updates; -1 until the servers have agreed.
    updates: int = -1


class SavedModel(msgspec.Struct, frozen=True):
    """A model that a script has saved under a name."""

    round: int
    weights_sha256: str


class Ledger:
    """The ledger. `new_rounds` and `new_contributions` collect rows for the event log until they are fetched."""

    def __init__(self, settings: Settings, policy: Policy) -> None:
        self.settings = settings
        #: The layout of the model, once a worker has sent it.
        self.layout: Layout | None = None
        #: The model, once a worker has sent it.
        self.setup: Setup | None = None
        #: The known plans.
        self.segments: list[Segment] = []
        #: The end that a script has asked for; None if none has.
        self.run_end: RunEnd | None = None
        #: The plans of the run before it was resumed.
        self.earlier: list[Segment] = []
        #: By round: the state of the scripts, in their own encoding.
        self.states: dict[int, bytes] = {}
        #: The models that scripts have saved, by name.
        self.saved: dict[str, SavedModel] = {}
        #: Outcomes of collectives, by their place in the script.
        self.outcomes: dict[str, CollectiveOutcome] = {}
        #: By 'setup' or plan: facts that all workers must have in common, from the first worker that sent them.
        self.facts: dict[str, FirstFacts] = {}
        self.totals = Totals()
        #: The number of committed updates: every server that takes part has applied the ones below it.
        self.committed = 0
        self.new_rounds: list[Committed] = []
        self.new_contributions: list[Contribution] = []
        #: Workers that have contributed to a reported round.
        self.contributors: set[str] = set()
        #: By data epoch and metric: (sum of metric x weight, weight).
        self._epoch_metrics: dict[int, dict[str, tuple[float, float]]] = {}
        #: The newest updates and their rounds: a data epoch's worth of rounds, or one update that has more.
        self._newest: deque[tuple[range, Committed]] = deque()
        self._policy = policy
        #: By server: its newest report.
        self.reported: dict[int, Reported] = {}
        #: Rounds that server 0 has applied and some other server has not.
        self.pending: list[Committed] = []
        #: Micro-batches that servers have dropped of rounds that are not committed.
        self.dropped: list[Contribution] = []

    def go_on(self, settings: Settings) -> None:
        """Go on with other settings. The workers send the model and the plans again."""
        self.settings, self._policy = settings, load(settings)
        self.layout = self.setup = None
        self.segments, self.facts, self.outcomes = [], {}, {}
        self.pending, self.dropped, self.reported = [], [], {}
        self.contributors = set()

    # ---- the model and the plans

    def past(self, round_: int) -> Past:
        """Return the segments that ended before a round, and the newest state of the scripts from before it."""
        known = {segment.index: segment for segment in [*self.earlier, *self.segments]}
        states = [kept for kept in self.states if kept < round_]
        ended = [known[index] for index in sorted(known) if known[index].end < round_]
        return Past(round_, ended, self.states[max(states)] if states else b"")

    def set_up(self, setup: Setup, who: str = "") -> Body:
        """Take the first worker's model, or compare a worker's model with the known one. Return the answer.

        `who` is the worker's name in messages.
        """
        facts, setup = setup.facts, msgspec.structs.replace(setup, facts=[])
        if self.setup is None:
            try:
                check_setup(setup)
                layout = make_layout(setup.tensors, self.settings.servers, setup.tables, setup.sharded_layers)
                check_file(setup.file, sizes(layout))
            except (UsageError, WireError) as error:
                return Refused("Setup", str(error))
            self.layout, self.setup = layout, setup
        elif setup != self.setup:
            return Refused("Setup", differences.of_setups(self.setup, self._owner("setup"), setup, who))
        reason = self._differs("setup", facts, who)
        return Refused("Setup", reason) if reason else SetupReply()

    def plan(self, segment: Segment, facts: Sequence[Fact] = (), who: str = "", may_define: bool = True) -> Body | None:
        """Take a new plan, or compare a worker's plan with the known one. Return the answer.

        Return None if the plan is new and `may_define` is False: another worker must define it. `who` is the worker's name in
        messages.
        """
        if segment.index == len(self.segments) and segment.follows(self.segments[-1] if self.segments else None):
            if not may_define:
                return None
            self.segments.append(segment)
        elif segment.index >= len(self.segments) or self.segments[segment.index] != segment:
            return Refused("Plan", differences.of_plans(self.segments, self._owner(f"plan {segment.index}"), segment, who))
        reason = self._differs(f"plan {segment.index}", facts, who)
        return Refused("Plan", reason) if reason else PlanReply(segment.index)

    def _differs(self, about: str, facts: Sequence[Fact], who: str) -> str:
        """Return a sentence on a fact in which a worker differs from the first worker, or ''."""
        known = self.facts.setdefault(about, FirstFacts(who, list(facts)))
        return difference(known, facts, who)

    def _owner(self, about: str) -> str:
        """Return the name of the worker with which all others are compared."""
        return self.facts[about].by if about in self.facts and self.facts[about].by else "the other workers"

    @property
    def planned(self) -> int:
        """Return the number of updates in all known plans, up to the run's end if a script has asked for one."""
        known = sum(self._policy.updates(segment) for segment in self.segments)
        return known if self.ends_after < 0 else min(known, self.ends_after)

    @property
    def ends_after(self) -> int:
        """Return the number of updates after which the run ends early; -1 if no script has asked, or it is not decided."""
        return self.run_end.updates if self.run_end is not None else -1

    @property
    def end(self) -> int:
        """Return the number of rounds of all known plans, up to the run's end."""
        return self._progress(self.planned)[0]

    @property
    def passes(self) -> int:
        """Return the number of data epochs that the known plans begin."""
        return sum(segment.passes for segment in self.segments)

    @property
    def done(self) -> tuple[int, int]:
        """Return how many rounds are committed, and how many data epochs are complete."""
        return self._progress(self.totals.rounds)

    def _progress(self, of: int) -> tuple[int, int]:
        """Return how many rounds and whole data epochs the first `of` updates make."""
        rounds = epochs = first = 0
        for segment in self.segments:
            updates = self._policy.updates(segment)
            done = self._policy.rounds_in(segment, max(0, min(of - first, updates)))
            rounds, epochs, first = rounds + done, epochs + done // segment.rounds_per_epoch, first + updates
        return rounds, epochs

    def segment_of(self, update: int) -> Segment | None:
        """Return the segment of update number `update`, or None if no plan has it."""
        first = 0
        for segment in self.segments:
            if first <= update < first + self._policy.updates(segment):
                return segment
            first += self._policy.updates(segment)
        return None

    def epoch_of(self, update: int) -> int:
        """Return the data epoch in which an update begins."""
        segment = self.segment_of(update)
        return 0 if segment is None else segment.round(self._rounds_of(segment, update)[0]).epoch

    def _rounds_of(self, segment: Segment, update: int) -> range:
        """Return the rounds that make update number `update`, which is in `segment`."""
        number = update - sum(self._policy.updates(earlier) for earlier in self.segments[: segment.index])
        begin, end = (segment.first_round + self._policy.rounds_in(segment, n) for n in (number, number + 1))
        return range(begin, end)

    def micro_batches(self, round_: int) -> int:
        """Return the number of micro-batches of a round, or 0 if no plan has it."""
        for segment in self.segments:
            if segment.first_round <= round_ < segment.end:
                return segment.round(round_).micro_batches
        return 0

    # ---- servers' reports

    def report(self, server: int, report: Report) -> Body:
        """Take a server's report, which counts once, however often it is sent. Return the acknowledgement.

        Raises WireError if the report names updates that no plan has.
        """
        if any(self.segment_of(t) is None for t in [row.round for row in report.rounds] + [row.round for row in report.dropped]):
            raise WireError(f"server-{server} reports updates that no plan knows")
        before = self.reported.get(server, Reported(-1, 0))
        if report.seq > before.seq:
            self.reported[server] = Reported(report.seq, max(report.version, before.version))
            first = self.pending[-1].round + 1 if self.pending else self.committed
            first = first if report.may_repeat else 0  # the process before has reported earlier rounds
            self.pending += [row for row in report.rounds if row.round >= first]
            contributions = [row for row in report.contributions if row.round >= first]
            self.new_contributions += contributions
            for row in contributions:
                self.contributors.add(row.worker)
                self.count(row.outcome, row.staleness, 1, row.micro_batches)
            self.dropped += [row for row in report.dropped if row.round >= self.committed]
            self._commit()
        return ReportAck(report.seq)

    def replaced(self, server: int) -> None:
        """Note that another process replaces a server. It numbers its reports from the beginning."""
        if server in self.reported:
            self.reported[server] = Reported(-1, self.reported[server].version)

    def count(self, outcome: str, staleness: int | None, contributions: int, micro_batches: int) -> None:
        """Count contributions with one outcome. Together they have `micro_batches` micro-batches."""
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
        """Find the micro-batches of a round that not all servers have dropped in full. Add rows "dropped in part" for them."""
        by_micro_batch: dict[int, list[Contribution]] = {}
        for row in self.dropped:
            if row.round == round_:
                by_micro_batch.setdefault(row.lo, []).append(row)
        for rows in by_micro_batch.values():
            if [row.outcome for row in rows] != ["dropped"] * servers:
                self.count("dropped in part", None, 1, 1)
                self.new_contributions.append(msgspec.structs.replace(rows[0], outcome="dropped in part"))
        self.dropped = [row for row in self.dropped if row.round > round_]

    def book(self, row: Committed) -> None:
        """Count the next round, which all servers have applied."""
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
            total, weight = metrics.get(name, (0.0, 0.0))
            metrics[name] = total + value * row.total_weight, weight + row.total_weight
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
        """Return the weighted mean of a metric over a data epoch's committed rounds."""
        total, weight = self._epoch_metrics.get(ask.epoch, {}).get(ask.name, (0.0, 0.0))
        complete = self.committed >= self.planned or self.epoch_of(self.committed) > ask.epoch
        return Mean(ask.epoch, ask.name, total / weight if weight else None, complete)

    def recent(self, name: str) -> Recent | None:
        """Return the mean of a metric over a data epoch's worth of the newest rounds, or of one update that has more."""
        having = [(rounds, row) for rounds, row in self._newest if name in row.metrics and row.total_weight]
        weight = sum(row.total_weight for _, row in having)
        if not weight:
            return None
        total = sum(row.metrics[name] * row.total_weight for _, row in having)
        return Recent(total / weight, range(having[0][0].start, having[-1][0].stop))
