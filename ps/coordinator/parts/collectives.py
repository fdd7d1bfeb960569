"""Operations that all workers' scripts call in the same order: to agree on a value, to evaluate together, and to save."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from roundtable.common.protocol.messages.session import (
    MODEL_NAME,
    MOST_PARTS,
    Collective,
    CollectiveOutcome,
    CollectiveParts,
    PartDone,
    Refused,
)
from roundtable.common.runtime.errors import WireError
from roundtable.ps.coordinator.context import Received, RunContext
from roundtable.ps.coordinator.parts.model import ModelCollector
from roundtable.ps.coordinator.parts.summary import RunSummary

#: Bytes that the outcomes of a run may have together. Workers that join later need all of them.
_MOST_BYTES = 64 << 20
#: Collectives that may be open at a time. Scripts that call the same ones are at a few different places.
_MOST_OPEN = 100
#: So many workers may compute the same part at a time, if a worker has nothing else to do.
_COPIES = 2


@dataclass
class OpenCollective:
    """A collective whose outcome is not known. Any worker may compute any part, and the first result of a part counts."""

    first: Collective
    #: The worker that came first, for messages.
    who: str
    done: dict[int, PartDone] = field(default_factory=dict)
    #: By part that is not done: the workers that were given it.
    given: dict[int, list[str]] = field(default_factory=dict)
    #: By worker that has come: the route of its newest message.
    routes: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.given = {part: [] for part in range(self.first.parts)}

    def differs(self, other: Collective, who: str) -> str:
        """Return a sentence on how `other` differs from the first worker's collective, or ''."""
        same = (self.first.kind, self.first.parts, self.first.samples, self.first.name)
        if (other.kind, other.parts, other.samples, other.name) == same:
            return ""
        return (
            f"the script of {who} is at {_text(other)} where that of {self.who} is at {_text(self.first)}: all workers must call "
            "run.agree(), run.evaluate() and run.save() in the same order, with the same data."
        )

    def take(self, done: list[PartDone]) -> bool:
        """Take results. Return whether any of them is new."""
        new = [one for one in done if self.given.pop(one.part, None) is not None]
        self.done.update((one.part, one) for one in new)
        return bool(new)

    def give(self, worker: str, active: set[str]) -> list[int]:
        """Return the parts that `worker` is to compute: some that no active worker has, else the oldest that others have."""
        for holders in self.given.values():
            holders[:] = [name for name in holders if name in active and name != worker]
        free = [part for part, holders in self.given.items() if not holders]
        if free:
            parts = free[: min(MOST_PARTS, math.ceil(len(free) / (2 * max(1, len(active)))))]
        else:
            parts = [part for part, holders in self.given.items() if len(holders) < _COPIES][:1]
        for part in parts:
            self.given[part].append(worker)
        return parts

    def outcome(self) -> CollectiveOutcome:
        """Return the outcome, once all parts are done. It is the same whoever has computed which part."""
        results = [self.done[part] for part in range(self.first.parts)]
        value = results[0].value if self.first.kind == "agree" else b""
        names = dict.fromkeys(name for one in results for name in one.sums)
        means = {name: mean([one.sums[name] for one in results if name in one.sums]) for name in names}
        return CollectiveOutcome(self.first.loops, self.first.number, value, means)


def mean(sums: list[tuple[float, float]]) -> float:
    """Return the mean of parts that are given as (sum of value x weight, weight). It is rounded once; NaN without weight."""
    totals, weights = zip(*sums, strict=True)
    weight = math.fsum(weights)
    if not weight or not all(map(math.isfinite, totals)):
        return sum(totals) / weight if weight else math.nan
    return math.fsum(totals) / weight


def place_of(body: Collective | CollectiveOutcome) -> str:
    """Return the place of a collective in a script, as a key of the event log."""
    return f"{body.loops}/{body.number}"


class Collectives:
    """Gives workers parts of a collective to compute, and all of them its outcome."""

    def __init__(self, context: RunContext, model: ModelCollector, summary: RunSummary) -> None:
        self._context = context
        self._model = model
        self._summary = summary
        self._open: dict[str, OpenCollective] = {}

    def at(self, message: Received[Collective]) -> None:
        """Answer a worker that has come to a collective, or has computed parts of it."""
        context, worker, body = self._context, message.member, message.body
        place = place_of(body)
        if (outcome := context.ledger.outcomes.get(place)) is not None:
            context.journal.promise(message.route, outcome, urgent=True)
            return
        if not re.fullmatch(MODEL_NAME, body.name) or bool(body.name) != (body.kind == "save"):
            raise WireError(f"{worker.name} wants to save a model under a name that is none")
        if place not in self._open:
            if len(self._open) >= _MOST_OPEN:
                raise WireError(f"{worker.name} is at one more collective, and {_MOST_OPEN} are open already", "flood")
            self._open[place] = OpenCollective(body, worker.who)
        known = self._open[place]
        if reason := known.differs(body, worker.who) or self._too_large():
            context.mail.reply(message.route, Refused("Collective", reason))
            return
        if known.take(body.done) or worker.name not in known.routes:
            context.progressed_at = message.now
        known.routes[worker.name] = message.route
        if not self._has_ended(place, known, message.now):
            active = set(context.membership.names("worker"))
            parts = known.give(worker.name, active) if body.kind == "evaluate" else []
            context.mail.reply(message.route, CollectiveParts(body.loops, body.number, parts, len(known.given)))

    def tick(self, now: float) -> None:
        """Save the model under the names that scripts have asked for, once the model of their round is complete."""
        for place, known in list(self._open.items()):
            self._has_ended(place, known, now)

    def _has_ended(self, place: str, known: OpenCollective, now: float) -> bool:
        """End a collective if all its parts are done. Return whether that is so. This does the part of a model to save."""
        if known.first.kind == "save" and self._model.is_complete and self._model.save_as(known.first.name):
            known.take([PartDone(0)])
            self._context.progressed_at = now
        if not known.given:
            self._end(place, known)
        return not known.given

    def _too_large(self) -> str:
        if sum(len(outcome.value) for outcome in self._context.ledger.outcomes.values()) <= _MOST_BYTES:
            return ""
        return f"the values of run.agree() have more than {_MOST_BYTES >> 20} MiB together, which workers that join later need."

    def _end(self, place: str, known: OpenCollective) -> None:
        """Keep the outcome, and tell the workers that wait for it once it is on the disk."""
        context, outcome = self._context, known.outcome()
        del self._open[place]
        context.ledger.outcomes[place] = outcome
        if outcome.means:
            self._summary.evaluated(known.first.round, known.first.samples, outcome.means, len(context.ledger.outcomes))
        for route in known.routes.values():
            context.journal.promise(route, outcome, urgent=True)


def _text(body: Collective) -> str:
    if body.kind == "save":
        return f"run.save('{body.name}')"
    return "run.agree()" if body.kind == "agree" else f"run.evaluate() of {body.samples} samples in {body.parts} batches"
