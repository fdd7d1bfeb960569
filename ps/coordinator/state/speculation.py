"""Speculative execution: an idle worker computes a micro-batch that its owner has not finished.

Source: Dean and Ghemawat, "MapReduce" (OSDI 2004), section 3.6. Contributions are idempotent, so a wrong guess costs a little
work and never makes a wrong sum. Speculation does not change the result. It makes rounds faster, and computes the micro-batches
of workers that are gone.
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

#: An idle worker repeats a micro-batch if the owner's estimated remaining time exceeds the idle worker's time by this factor.
_GAIN = 1.25
#: Or if the owner has taken this many times as long as usual,
_OVERDUE = 1.5
#: and this many times as long as the idle worker would.
_PATIENCE = 2.0
#: Seconds after which a reassignment without a result is repeated.
_REASSIGN_AGAIN_S = 2.0
#: A micro-batch must be missing this many seconds before it is reassigned, because servers' news is as old as a heartbeat.
_MISSING_S = 1.0
#: A contribution counts as under way for this many times the usual transfer time,
_SENT_TIMES = 2.0
#: for at least this many seconds,
_SENT_S = 3.0
#: and for this many seconds if the usual time is not known.
_SENT_FIRST_S = 15.0
#: The coordinator gets a worker's news within this many seconds.
_NEWS_S = 0.2
#: A worker may have at most this many seconds of orphaned work ahead,
_AHEAD_S = 0.5
#: and at most this many orphaned micro-batches.
_MOST_AHEAD = 64
#: A view of all workers is used for this many seconds per worker and open round. It is slow to make, and many workers ask.
_VIEW_S = 5e-5


@dataclass
class _StragglerView:
    """The progress of all workers in a round."""

    #: The view may be used until this time.
    until: float
    #: By worker: micro-batches that the worker has not begun.
    runs: dict[str, list[int]]
    #: Workers in `runs` that are still in earlier rounds.
    behind: set[str]
    #: (begin, worker) of workers that are overdue with a micro-batch of the round, the longest first.
    overdue: list[tuple[float, str]]
    #: (likely end, begin, worker) of the other workers that compute a micro-batch of the round, the last first.
    due: list[tuple[float, float, str]]
    #: (likely end, worker, micro-batch) that slow workers may have begun by now, the last first.
    next: list[tuple[float, str, int]]

    def keep_only(self, lacking: set[int]) -> None:
        """Forget all micro-batches except those that servers lack."""
        self.runs = {name: left for name, ks in self.runs.items() if (left := [k for k in ks if k in lacking])}
        self.next = [one for one in self.next if one[2] in lacking]

    def take_next(self, waiting: Member, now: float) -> tuple[str, int] | None:
        """Return a slow worker and its next micro-batch, if `waiting` would finish that micro-batch sooner."""
        for one in self.next:
            done_at, owner, k = one
            if owner != waiting.name and done_at - now > _GAIN * _cost_of_another(waiting):
                self.next.remove(one)
                return owner, k
        return None

    def late_for(self, waiting: Member, now: float) -> Iterator[tuple[float, str]]:
        """Yield (begin, worker) for workers whose current micro-batch `waiting` should compute too."""
        cost = _cost_of_another(waiting)
        yield from takewhile(lambda one: now - one[0] > _PATIENCE * cost, self.overdue)
        yield from ((since, name) for _, since, name in takewhile(lambda one: one[0] - now > _GAIN * cost, self.due))


class Speculation:
    """Reassigns micro-batches, and keeps to which worker."""

    def __init__(self) -> None:
        #: By (round, micro-batch): the worker of the last reassignment.
        self.reassigned: dict[tuple[int, int], str] = {}
        #: By (round, micro-batch): when the last reassignment was made.
        self._reassigned_at: dict[tuple[int, int], float] = {}
        #: By round: the view of all workers.
        self._views: dict[int, _StragglerView] = {}
        #: Rounds before this one are forgotten.
        self._first = 0
        #: By worker: (round, unacknowledged micro-batches, since when) of its last heartbeat.
        self._sent: dict[str, tuple[int, list[int], float]] = {}
        #: By (round, micro-batch) that servers lack and no worker has: since when.
        self._missing_since: dict[tuple[int, int], float] = {}
        #: `_missing_since` and `_lacking` may be used until this time.
        self._missing_until = float("-inf")
        #: The round of the micro-batches in `_missing_since`.
        self._missing_round = -1
        #: Micro-batches that have been missing for longer than _MISSING_S.
        self._lacking: list[tuple[int, int]] = []
        #: If each push is applied at once, by (round, micro-batch) that servers lack and no worker will compute: since when.
        self._free_since: dict[tuple[int, int], float] = {}

    def reassign(
        self,
        waiting: str,
        rounds: range,
        count: Callable[[int], int],
        tables: list[ShareTable],
        workers: Mapping[str, Member],
        now: float,
        lacking: Mapping[int, set[int]] | None = None,
    ) -> Reassign | None:
        """Return the reassignment of a micro-batch to the idle worker `waiting`, from the earliest of `rounds`, or None.

        `count(round)` is the number of a round's micro-batches. `lacking` has by round the micro-batches that servers lack, if
        servers report that for all open rounds, else it is None.
        """
        if rounds.start > self._first:
            self._forget(rounds.start)
        until = now + _VIEW_S * len(workers) * len(rounds)
        for round_ in rounds if lacking is None else [round_ for round_ in rounds if round_ in lacking]:
            view = self._views.get(round_)
            if view is None or now >= view.until:
                view = self._views[round_] = self._observe(round_, count(round_), tables, workers, now, until)
                if lacking is not None:
                    view.keep_only(lacking[round_])
            others = (w for w in view.runs if w != waiting and _is_worth_it(workers[waiting], workers.get(w), view, w, now))
            owner = max(others, key=lambda w: (len(view.runs[w]), w), default=None)
            if owner is not None:
                k = view.runs[owner].pop()
                if not view.runs[owner]:
                    del view.runs[owner]
                return self._assign(round_, k, waiting, owner, now)
            if (found := view.take_next(workers[waiting], now)) is not None:
                return self._assign(round_, found[1], waiting, found[0], now)
            for since, name in view.late_for(workers[waiting], now):
                other = workers[name]
                still = _computes(other, round_) and other.since == since
                if still and name != waiting and self._has(name, (round_, other.heartbeat.micro_batch)):
                    return self._assign(round_, other.heartbeat.micro_batch, waiting, name, now)
        return None

    def reassign_missing(
        self, waiting: str, round_: int, missing: Iterable[int], count: int, tables: list[ShareTable],
        workers: Mapping[str, Member], now: float,
    ) -> Reassign | None:  # fmt: skip
        """Return the reassignment of a micro-batch that servers lack in their open round and no worker seems to finish, or None.

        A micro-batch may be missing if a worker is gone or cannot reach a server any more. It may also be missing if two workers
        used different share tables for a round, or if a reassignment was lost on its way.
        """
        if now >= self._missing_until or round_ != self._missing_round:
            self._missing_until, self._missing_round = now + _VIEW_S * len(workers), round_
            held = self._held(round_, count, tables, workers[waiting], workers, now)
            nowhere = {(round_, k) for k in missing if k not in held}
            self._missing_since = {key: self._missing_since.get(key, now) for key in nowhere}
            self._lacking = sorted(key for key, since in self._missing_since.items() if now - since > _MISSING_S)
        for key in self._lacking:
            has_sent = workers[waiting].heartbeat.round == round_ and key[1] in workers[waiting].heartbeat.unacknowledged
            if not has_sent and now - self._reassigned_at.get(key, float("-inf")) > _REASSIGN_AGAIN_S:
                return self._assign(*key, waiting, "", now)
        return None

    def assign_orphans(
        self,
        lacking: Mapping[int, set[int]],
        count: Callable[[int], int],
        tables: list[ShareTable],
        workers: Mapping[str, Member],
        now: float,
    ) -> list[Reassign]:
        """Return assignments of micro-batches that no worker will compute, to workers that have reached their round.

        `lacking` has by round, earliest first, the micro-batches that servers lack. This is for policies that apply each push at
        once, with many open rounds. A micro-batch has no owner if its worker is gone, or if two workers used different share
        tables. No worker waits for it until the end. But as long as it is missing, no later round is closed, so no checkpoint
        could include one.
        """
        if lacking and (first := min(lacking)) > self._first:
            self._forget(first)
        active = {name: member for name, member in workers.items() if member.active}
        free = self._free(lacking, count, tables, active, now)
        self._free_since = {key: self._free_since.get(key, now) for key in free}
        has = Counter({name: len(member.heartbeat.reassigned_here) for name, member in active.items()})
        for (round_, k), to in self.reassigned.items():
            has[to] += now - self._reassigned_at[round_, k] <= _REASSIGN_AGAIN_S and k in lacking.get(round_, ())
        room = {name: _most_ahead(member) - has[name] for name, member in active.items()}
        reassignments = []
        for round_, k in [key for key, since in self._free_since.items() if now - since > _MISSING_S]:
            able = [name for name, member in active.items() if member.reached >= round_ and room[name] > 0]
            if not able:
                break
            to = max(able, key=lambda name: (room[name], name))
            room[to] -= 1
            reassignments.append(self._assign(round_, k, to, "", now))
        return reassignments

    def _free(
        self,
        lacking: Mapping[int, set[int]],
        count: Callable[[int], int],
        tables: list[ShareTable],
        active: Mapping[str, Member],
        now: float,
    ) -> list[tuple[int, int]]:
        """Return the micro-batches that servers lack and no active worker will compute, computes or has just sent.

        A worker that is past a round has done its share of that round, and servers have the result: the worker got weights since.
        """
        held: set[tuple[int, int]] = set()
        for name, member in active.items():
            heartbeat = member.heartbeat
            own = {*heartbeat.reassigned_here, *((heartbeat.round, k) for k in [*heartbeat.not_started, heartbeat.micro_batch])}
            held |= {key for key in own if self._has(name, key)}
            if self._is_on_its_way(name, member, now):
                held |= {(heartbeat.round, k) for k in heartbeat.unacknowledged}
        free = []
        for round_, ks in lacking.items():
            table, size = in_force(tables, round_), count(round_)
            of = {k: name for name, member in active.items() if member.reached < round_ for k in table.run(name, size)}
            for k in ks:
                is_given = now - self._reassigned_at.get((round_, k), float("-inf")) <= _REASSIGN_AGAIN_S
                if not is_given and (round_, k) not in held and not (k in of and self._has(of[k], (round_, k))):
                    free.append((round_, k))
        return free

    def _has(self, name: str, key: tuple[int, int]) -> bool:
        """Return whether a micro-batch was not reassigned to a worker other than `name`."""
        return self.reassigned.get(key, name) == name

    def _forget(self, before: int) -> None:
        """Forget the rounds before `before`, which are over."""
        self._first = before
        for key in [key for key in self.reassigned if key[0] < before]:
            del self.reassigned[key], self._reassigned_at[key]
        self._views = {round_: view for round_, view in self._views.items() if round_ >= before}

    def _assign(self, round_: int, k: int, to: str, owner: str, now: float) -> Reassign:
        self.reassigned[round_, k] = to
        self._reassigned_at[round_, k] = now
        return Reassign(round_, k, to, owner)

    def _observe(
        self, round_: int, count: int, tables: list[ShareTable], workers: Mapping[str, Member], now: float, until: float
    ) -> _StragglerView:
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
        return _StragglerView(until, runs, behind, sorted(overdue), sorted(due, reverse=True), sorted(next_, reverse=True))

    def _held(
        self, round_: int, count: int, tables: list[ShareTable], waiting: Member, workers: Mapping[str, Member], now: float
    ) -> set[int]:
        """Return the micro-batches of `round_` that some worker will compute, computes, or has just sent."""
        runs = self._not_begun(round_, count, in_force(tables, round_), workers)
        held = {k for name, ks in runs.items() if name in workers and workers[name].active for k in ks}
        patience_s = _PATIENCE * _cost_of_another(waiting)
        for name, member in workers.items():
            if member.active and member.heartbeat.round == round_:
                if self._is_on_its_way(name, member, now):
                    held |= set(member.heartbeat.unacknowledged)
                if not _is_overdue(member, now) or now - member.since <= patience_s:
                    held.add(member.heartbeat.micro_batch)
        return held

    def _is_on_its_way(self, name: str, member: Member, now: float) -> bool:
        """Return whether a worker's unacknowledged contributions may still arrive."""
        round_, sent = member.heartbeat.round, member.heartbeat.unacknowledged
        before, known, since = self._sent.get(name, (-1, [], 0.0))
        if before != round_:
            since = member.since
        elif known != sent:
            since = now
        self._sent[name] = round_, sent, max(since, member.since)
        transfer = member.heartbeat.transfer
        return now - self._sent[name][2] < (max(_SENT_S, _SENT_TIMES * transfer) if transfer else _SENT_FIRST_S)

    def _not_begun(self, round_: int, count: int, table: ShareTable, workers: Mapping[str, Member]) -> dict[str, list[int]]:
        """Return by worker the micro-batches of `round_` that it has and has not begun, as far as is known."""
        out: dict[str, list[int]] = {}
        for name in {*table.workers, *workers}:
            member = workers.get(name)
            gone = member is None or not member.active
            if member is not None and not gone and member.heartbeat.round == round_:
                ks = member.heartbeat.not_started
            elif member is None or gone or member.reached < round_:
                ks = list(table.run(name, count))
            elif taken := [k for r, k in member.heartbeat.reassigned_here if r == round_]:
                ks = taken
            else:
                continue
            out[name] = [k for k in ks if self.reassigned.get((round_, k), name) == name]
            if gone:  # micro-batches that were reassigned to a lost worker are open again
                out[name] += [k for (r, k), to in self.reassigned.items() if r == round_ and to == name and k not in out[name]]
        return out


def _most_ahead(member: Member) -> int:
    """Return how many orphaned micro-batches a worker may have ahead."""
    return max(1, min(_MOST_AHEAD, int(_AHEAD_S / member.heartbeat.seconds))) if member.heartbeat.seconds else 1


def _computes(member: Member, round_: int) -> bool:
    """Return whether `member` computes `member.heartbeat.micro_batch` of `round_`."""
    return member.active and member.heartbeat.round == round_ and member.heartbeat.micro_batch >= 0


def _may_begin(member: Member | None, now: float) -> int:
    """Return how many micro-batches a worker may have begun that the coordinator has not heard of.

    A worker begins the next micro-batch when the current one has taken as long as usual. Its heartbeat follows soon afterwards.
    """
    if member is None or not member.active or member.heartbeat.seconds <= 0:
        return 0
    seconds, elapsed = member.heartbeat.seconds, now - member.since
    if _is_quick(member):
        return math.ceil(_NEWS_S / max(seconds, 1e-6)) if elapsed < 2 * _NEWS_S else 0
    return int(0.7 * seconds < elapsed < 1.5 * seconds + _NEWS_S)


def _is_quick(member: Member) -> bool:
    """Return whether a worker may do several micro-batches before its heartbeat arrives."""
    return member.heartbeat.seconds < _NEWS_S


def _done_next_at(member: Member) -> float:
    """Return when a worker's next micro-batch is likely to have arrived."""
    return member.since + member.heartbeat.seconds + _cost(member)


def _cost(worker: Member) -> float:
    """Return the seconds until a micro-batch that is reassigned to a worker has arrived."""
    return worker.heartbeat.seconds + worker.heartbeat.transfer


def _cost_of_another(waiting: Member) -> float:
    """Return `_cost` of an idle worker, but at least the average age of heartbeats: news of other workers is as old."""
    return max(_cost(waiting), _NEWS_S / 2)


def _is_worth_it(waiting: Member, owner: Member | None, view: _StragglerView, name: str, now: float) -> bool:
    """Return whether `waiting` should compute micro-batches that `owner` has not begun.

    It should not if the owner would be sooner. On a slow network a worker that is behind may be about to get its weights, and one
    more contribution takes time to send.
    """
    if owner is None or not owner.active:
        return True
    if name in view.behind:
        return now - waiting.since >= waiting.heartbeat.transfer
    return len(view.runs[name]) * owner.heartbeat.seconds >= waiting.heartbeat.transfer


def _is_overdue(member: Member, now: float) -> bool:
    """Return whether a worker's micro-batch takes longer than usual, or its usual time is unknown."""
    return now - member.since > _OVERDUE * member.heartbeat.seconds
