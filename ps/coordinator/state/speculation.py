"""Backup tasks: a worker that waits takes over a micro-batch that another has not done.

Dean and Ghemawat, "MapReduce" (OSDI 2004), section 3.6. Contributions are idempotent, so a wrong guess costs a little work
and never a wrong sum: nothing here is needed for the result, only for speed, and for workers that are gone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile

from roundtable.common.config.work_shares import ShareTable, in_force
from roundtable.common.protocol.messages.session import Reassign
from roundtable.ps.coordinator.state.roster import Member

#: A micro-batch being computed is done a second time when, going by how long they have taken before, who computes it will take
#: this many times longer than the waiting worker would from now;
_GAIN = 1.25
#: or when it has taken this many times as long as it takes who computes it, and this many times what it costs the other.
_OVERDUE, _PATIENCE = 1.5, 2.0
#: Seconds after which a lease that came to nothing is given again.
_AGAIN_S = 2.0
#: Seconds for which a micro-batch must be nowhere before it is leased: what servers say of themselves is as old as a beat.
_MISSING_S = 1.0
#: Seconds for which it is believed that what a worker has sent is still on its way though nothing more of it arrives: so many
#: times as long as all of it takes on its way, but so many at least; and as long as nobody knows how long that is.
_SENT_TIMES = 2.0
_SENT_S = 3.0
_SENT_FIRST_S = 15.0
#: Seconds that a worker's news may take until they are known.
_NEWS_S = 0.2
#: Seconds of work that a worker is dealt ahead of what nobody does, and the most micro-batches that it comes to.
_DEALT_S = 0.5
_MOST_DEALT = 64
#: Seconds, by worker and open round, for which what was seen of all of them is believed: looking at many takes time, and many ask
#: at once.
_LOOK_S = 5e-5


@dataclass
class _Look:
    """What was seen of a round, for all who ask until then."""

    until: float
    #: Micro-batches that workers have not begun, of those that have any; and those of them that are still in earlier rounds.
    runs: dict[str, list[int]]
    behind: set[str]
    #: Since when, and who computes a micro-batch of the round: who is overdue, longest first; and the others, after the time
    #: at which they are likely to have done it, last first.
    overdue: list[tuple[float, str]]
    due: list[tuple[float, float, str]]
    #: Micro-batches that slow workers may have begun by now, after the time at which each is likely to be done, last first.
    next: list[tuple[float, str, int]]

    def keep_only(self, lacking: set[int]) -> None:
        """Servers have got all but these."""
        self.runs = {name: left for name, ks in self.runs.items() if (left := [k for k in ks if k in lacking])}
        self.next = [one for one in self.next if one[2] in lacking]

    def take_next(self, waiting: Member, now: float) -> tuple[str, int] | None:
        """Whose micro-batch `waiting` will have done sooner than a slow worker that may have begun it, and which."""
        for one in self.next:
            done_at, owner, k = one
            if owner != waiting.name and done_at - now > _GAIN * _cost_of_another(waiting):
                self.next.remove(one)
                return owner, k
        return None

    def late_for(self, waiting: Member, now: float) -> Iterator[tuple[float, str]]:
        """Those whose micro-batch `waiting` had better do too, and since when they have been at it."""
        cost = _cost_of_another(waiting)
        yield from takewhile(lambda one: now - one[0] > _PATIENCE * cost, self.overdue)
        yield from ((since, name) for _, since, name in takewhile(lambda one: one[0] - now > _GAIN * cost, self.due))


class Speculation:
    """Remembers which micro-batches were leased away from the table's run, and to whom."""

    def __init__(self) -> None:
        #: (round, k) -> the worker it was leased to as an exception, and when.
        self.leased: dict[tuple[int, int], str] = {}
        self._leased_at: dict[tuple[int, int], float] = {}
        self._looks: dict[int, _Look] = {}
        #: What was of rounds before this one is forgotten.
        self._first = 0
        #: What each worker said last of what it has sent, and since when: its round, and micro-batches that may not have arrived.
        self._sent: dict[str, tuple[int, list[int], float]] = {}
        #: Since when micro-batches have been missing without anybody having them; for how long that look holds, and of which
        #: round; and those that have been for too long.
        self._missing_since: dict[tuple[int, int], float] = {}
        self._missing_until = float("-inf")
        self._missing_round = -1
        self._lacking: list[tuple[int, int]] = []
        #: Where pushes are applied at once: since when servers have lacked micro-batches that nobody will do.
        self._free_since: dict[tuple[int, int], float] = {}

    def lease(
        self,
        waiting: str,
        rounds: range,
        count: Callable[[int], int],
        tables: list[ShareTable],
        workers: Mapping[str, Member],
        now: float,
        lacking: Mapping[int, set[int]] | None = None,
    ) -> Reassign | None:
        """A micro-batch of the earliest of `rounds` that has one for `waiting` to take over.

        `count(round)` is the number of its micro-batches; `lacking` are those that servers say they have not got, by round, where
        they say so of all rounds that may have some.
        """
        if rounds.start > self._first:
            self._forget(rounds.start)
        until = now + _LOOK_S * len(workers) * len(rounds)
        for round_ in rounds if lacking is None else [round_ for round_ in rounds if round_ in lacking]:
            look = self._looks.get(round_)
            if look is None or now >= look.until:
                look = self._looks[round_] = self._look(round_, count(round_), tables, workers, now, until)
                if lacking is not None:
                    look.keep_only(lacking[round_])
            others = (w for w in look.runs if w != waiting and _is_worth_it(workers[waiting], workers.get(w), look, w, now))
            owner = max(others, key=lambda w: (len(look.runs[w]), w), default=None)
            if owner is not None:
                k = look.runs[owner].pop()
                if not look.runs[owner]:
                    del look.runs[owner]
                return self._give(round_, k, waiting, owner, now)
            if (found := look.take_next(workers[waiting], now)) is not None:
                return self._give(round_, found[1], waiting, found[0], now)
            for since, name in look.late_for(workers[waiting], now):
                other = workers[name]
                still = _computes(other, round_) and other.since == since
                if still and name != waiting and self._has(name, (round_, other.beat.micro_batch)):
                    return self._give(round_, other.beat.micro_batch, waiting, name, now)
        return None

    def lease_missing(
        self, waiting: str, round_: int, missing: Iterable[int], count: int, tables: list[ShareTable],
        workers: Mapping[str, Member], now: float,
    ) -> Reassign | None:  # fmt: skip
        """One of the micro-batches that servers say are missing from their open round and that nobody seems to get done.

        So it is with what a worker had that is gone, where two workers used different tables for a round, where a lease of what
        a late one computes was lost on the way, and where a worker cannot reach a server any more.
        """
        if now >= self._missing_until or round_ != self._missing_round:
            self._missing_until, self._missing_round = now + _LOOK_S * len(workers), round_
            held = self._held(round_, count, tables, workers[waiting], workers, now)
            nowhere = {(round_, k) for k in missing if k not in held}
            self._missing_since = {key: self._missing_since.get(key, now) for key in nowhere}
            self._lacking = sorted(key for key, since in self._missing_since.items() if now - since > _MISSING_S)
        for key in self._lacking:
            has_sent = workers[waiting].beat.round == round_ and key[1] in workers[waiting].beat.unacknowledged
            if not has_sent and now - self._leased_at.get(key, float("-inf")) > _AGAIN_S:
                return self._give(*key, waiting, "", now)
        return None

    def deal(
        self,
        lacking: Mapping[int, set[int]],
        count: Callable[[int], int],
        tables: list[ShareTable],
        workers: Mapping[str, Member],
        now: float,
    ) -> list[Reassign]:
        """Where pushes are applied at once and many rounds are open: what servers lack (by round, earliest first) and nobody will
        do, dealt out to workers that have got to its round, be they waiting or not.

        So it is with what a worker had that is gone, and where two workers used different tables for a round. Nobody waits for
        these until the end, but no round after them counts as over, so none would be in a snapshot either.
        """
        if lacking and (first := min(lacking)) > self._first:
            self._forget(first)
        active = {name: member for name, member in workers.items() if member.active}
        free = self._free(lacking, count, tables, active, now)
        self._free_since = {key: self._free_since.get(key, now) for key in free}
        has = Counter({name: len(member.beat.reassigned_here) for name, member in active.items()})
        for (round_, k), to in self.leased.items():
            has[to] += now - self._leased_at[round_, k] <= _AGAIN_S and k in lacking.get(round_, ())
        room = {name: _most_dealt(member) - has[name] for name, member in active.items()}
        leases = []
        for round_, k in [key for key, since in self._free_since.items() if now - since > _MISSING_S]:
            able = [name for name, member in active.items() if member.reached >= round_ and room[name] > 0]
            if not able:
                break
            to = max(able, key=lambda name: (room[name], name))
            room[to] -= 1
            leases.append(self._give(round_, k, to, "", now))
        return leases

    def _free(
        self,
        lacking: Mapping[int, set[int]],
        count: Callable[[int], int],
        tables: list[ShareTable],
        active: Mapping[str, Member],
        now: float,
    ) -> list[tuple[int, int]]:
        """What servers lack and none of these workers will do, does or has just sent. One that is past a round has done its run
        of it, and its servers have that: it got weights since."""
        held: set[tuple[int, int]] = set()
        for name, member in active.items():
            beat = member.beat
            own = {*beat.reassigned_here, *((beat.round, k) for k in [*beat.not_started, beat.micro_batch])}
            held |= {key for key in own if self._has(name, key)}
            if self._is_on_its_way(name, member, now):
                held |= {(beat.round, k) for k in beat.unacknowledged}
        free = []
        for round_, ks in lacking.items():
            table, size = in_force(tables, round_), count(round_)
            of = {k: name for name, member in active.items() if member.reached < round_ for k in table.run(name, size)}
            for k in ks:
                is_given = now - self._leased_at.get((round_, k), float("-inf")) <= _AGAIN_S
                if not is_given and (round_, k) not in held and not (k in of and self._has(of[k], (round_, k))):
                    free.append((round_, k))
        return free

    def _has(self, name: str, key: tuple[int, int]) -> bool:
        """Whether what a worker has is its own still: it may hang, and who was leased that may not have heard of it."""
        return self.leased.get(key, name) == name

    def _forget(self, before: int) -> None:
        """Let go of rounds that are over."""
        self._first = before
        for key in [key for key in self.leased if key[0] < before]:
            del self.leased[key], self._leased_at[key]
        self._looks = {round_: look for round_, look in self._looks.items() if round_ >= before}

    def _give(self, round_: int, k: int, to: str, owner: str, now: float) -> Reassign:
        self.leased[round_, k] = to
        self._leased_at[round_, k] = now
        return Reassign(round_, k, to, owner)

    def _look(
        self, round_: int, count: int, tables: list[ShareTable], workers: Mapping[str, Member], now: float, until: float
    ) -> _Look:
        runs = self._not_begun(round_, count, in_force(tables, round_), workers)
        begun = {name: _may_begin(workers.get(name), now) for name in runs}
        next_ = [(_done_next_at(workers[w]), w, ks[0]) for w, ks in runs.items() if begun[w] and ks and not _is_quick(workers[w])]
        runs = {w: ks for w, all_ in runs.items() if (ks := all_[begun[w] :])}
        overdue, due = [], []
        for name, member in workers.items():
            if _computes(member, round_):
                if _is_overdue(member, now):
                    overdue.append((member.since, name))
                else:
                    due.append((member.since + _cost(member), member.since, name))
        behind = {w for w in runs if w in workers and workers[w].active and workers[w].reached < round_}
        return _Look(until, runs, behind, sorted(overdue), sorted(due, reverse=True), sorted(next_, reverse=True))

    def _held(
        self, round_: int, count: int, tables: list[ShareTable], waiting: Member, workers: Mapping[str, Member], now: float
    ) -> set[int]:
        """Micro-batches of `round_` that somebody will do, does, or has just sent."""
        runs = self._not_begun(round_, count, in_force(tables, round_), workers)
        held = {k for name, ks in runs.items() if name in workers and workers[name].active for k in ks}
        patience_s = _PATIENCE * _cost_of_another(waiting)
        for name, member in workers.items():
            if member.active and member.beat.round == round_:
                if self._is_on_its_way(name, member, now):
                    held |= set(member.beat.unacknowledged)
                if not _is_overdue(member, now) or now - member.since <= patience_s:
                    held.add(member.beat.micro_batch)
        return held

    def _is_on_its_way(self, name: str, member: Member, now: float) -> bool:
        """Whether to believe that what a worker has sent will arrive."""
        round_, sent = member.beat.round, member.beat.unacknowledged
        before, known, since = self._sent.get(name, (-1, [], 0.0))
        if before != round_:
            since = member.since
        elif known != sent:
            since = now
        self._sent[name] = round_, sent, max(since, member.since)
        transfer = member.beat.transfer
        return now - self._sent[name][2] < (max(_SENT_S, _SENT_TIMES * transfer) if transfer else _SENT_FIRST_S)

    def _not_begun(self, round_: int, count: int, table: ShareTable, workers: Mapping[str, Member]) -> dict[str, list[int]]:
        """What workers have of `round_` and have not begun, as far as is known."""
        out: dict[str, list[int]] = {}
        for name in {*table.workers, *workers}:
            member = workers.get(name)
            gone = member is None or not member.active
            if member is not None and not gone and member.beat.round == round_:
                ks = member.beat.not_started
            elif member is None or gone or member.reached < round_:
                ks = list(table.run(name, count))
            elif taken := [k for r, k in member.beat.reassigned_here if r == round_]:
                ks = taken
            else:
                continue
            out[name] = [k for k in ks if self.leased.get((round_, k), name) == name]
            if gone:  # what it was leased as an exception is open again as well
                out[name] += [k for (r, k), to in self.leased.items() if r == round_ and to == name and k not in out[name]]
        return out


def _most_dealt(member: Member) -> int:
    """How many micro-batches a worker may have ahead."""
    return max(1, min(_MOST_DEALT, int(_DEALT_S / member.beat.seconds))) if member.beat.seconds else 1


def _computes(member: Member, round_: int) -> bool:
    """Whether `member` is at a micro-batch of `round_`, which is `member.beat.micro_batch`."""
    return member.active and member.beat.round == round_ and member.beat.micro_batch >= 0


def _may_begin(member: Member | None, now: float) -> int:
    """How many of a worker's micro-batches it may have begun without its word of it having come.

    It begins the next one about when it has been at this one for as long as one takes; word of that is soon here.
    """
    if member is None or not member.active or member.beat.seconds <= 0:
        return 0
    seconds, elapsed = member.beat.seconds, now - member.since
    if _is_quick(member):
        return math.ceil(_NEWS_S / max(seconds, 1e-6)) if elapsed < 2 * _NEWS_S else 0
    return int(0.7 * seconds < elapsed < 1.5 * seconds + _NEWS_S)


def _is_quick(member: Member) -> bool:
    """Whether a worker may have done several micro-batches before word of the first one is here."""
    return member.beat.seconds < _NEWS_S


def _done_next_at(member: Member) -> float:
    """When what a worker begins next is likely to have arrived."""
    return member.since + member.beat.seconds + _cost(member)


def _cost(worker: Member) -> float:
    """Seconds until a micro-batch that a worker takes over has arrived."""
    return worker.beat.seconds + worker.beat.transfer


def _cost_of_another(waiting: Member) -> float:
    """The same for one that waits, and no less than its news take on average, for what is known of others is as old."""
    return max(_cost(waiting), _NEWS_S / 2)


def _is_worth_it(waiting: Member, owner: Member | None, look: _Look, name: str, now: float) -> bool:
    """Whether `waiting` should do what `owner` has not begun: not if that is sooner done by itself, as on a slow network, where
    one that is behind may be about to get its weights, and a contribution more is one more to send."""
    if owner is None or not owner.active:
        return True
    if name in look.behind:
        return now - waiting.since >= waiting.beat.transfer
    return len(look.runs[name]) * owner.beat.seconds >= waiting.beat.transfer


def _is_overdue(member: Member, now: float) -> bool:
    """Whether a worker has been at its micro-batch for longer than such take it, or nobody knows how long that is."""
    return now - member.since > _OVERDUE * member.beat.seconds
