"""Backup tasks: a worker that waits takes over a micro-batch that another has not done.

Dean and Ghemawat, "MapReduce" (OSDI 2004), section 3.6. Contributions are idempotent, so a wrong guess costs a little work
and never a wrong sum: nothing here is needed for the result, only for speed, and for workers that are gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from common.leases import Table, in_force
from common.messages import Lease
from ps.membership import Member

#: A micro-batch being computed is done a second time when it has taken this many times what the waiting worker needs for one.
_PATIENCE = 2.0
#: Seconds after which a lease that came to nothing is given again.
_AGAIN_S = 2.0
#: Seconds for which a micro-batch must be nowhere before it is leased: what servers say of themselves is as old as a beat.
_MISSING_S = 1.0
#: Seconds for which it is believed that what a worker has sent is still on its way.
_SENT_S = 15.0
#: Seconds that a worker's news may take until they are known.
_NEWS_S = 0.2


class Takeover:
    """Remembers which micro-batches were leased away from the table's run, and to whom."""

    def __init__(self) -> None:
        #: (round, k) -> the worker it was leased to as an exception, and when.
        self.leased: dict[tuple[int, int], str] = {}
        self._leased_at: dict[tuple[int, int], float] = {}
        #: Since when micro-batches have been missing without anybody having them.
        self._missing_since: dict[tuple[int, int], float] = {}

    def lease(
        self,
        waiting: str,
        rounds: range,
        count: Callable[[int], int],
        tables: list[Table],
        members: Mapping[str, Member],
        now: float,
    ) -> Lease | None:
        """A micro-batch of the earliest of `rounds` that has one for `waiting` to take over.

        `count(round)` is the number of its micro-batches.
        """
        for key in [key for key in self.leased if key[0] < rounds.start]:
            del self.leased[key], self._leased_at[key]
        for round_ in rounds:
            runs = self._not_begun(round_, count(round_), in_force(tables, round_), waiting, members)
            runs = {w: ks[_may_begin(members.get(w), now) :] for w, ks in runs.items()}
            owner = max(runs, key=lambda w: (len(runs[w]), w), default=None)
            if owner is not None and runs[owner]:
                return self._give(round_, runs[owner][-1], waiting, owner, now)
            for name, other in members.items():
                late = _computes(other, round_) and _is_late(other, members[waiting], now)
                if late and name != waiting and (round_, other.beat.at) not in self.leased:
                    return self._give(round_, other.beat.at, waiting, name, now)
        return None

    def lease_missing(
        self, waiting: str, round_: int, missing: Iterable[int], count: int, tables: list[Table],
        members: Mapping[str, Member], now: float,
    ) -> Lease | None:  # fmt: skip
        """One of the micro-batches that servers say are missing from their open round and that nobody seems to get done.

        So it is with what a worker had that is gone, where two workers used different tables for a round, and where a lease of
        what a late one computes was lost on the way.
        """
        runs = self._not_begun(round_, count, in_force(tables, round_), waiting, members)
        held = {k for name, ks in runs.items() if name in members and members[name].active for k in ks}
        for member in members.values():
            if member.active and member.beat.round == round_:
                if now - member.since < _SENT_S:
                    held |= set(member.beat.sent)
                if not _is_late(member, members[waiting], now):
                    held.add(member.beat.at)
        nowhere = {(round_, k) for k in missing if k not in held}
        self._missing_since = {key: self._missing_since.get(key, now) for key in nowhere}
        for key, since in sorted(self._missing_since.items()):
            if now - since > _MISSING_S and now - self._leased_at.get(key, float("-inf")) > _AGAIN_S:
                return self._give(*key, waiting, "", now)
        return None

    def _give(self, round_: int, k: int, to: str, owner: str, now: float) -> Lease:
        self.leased[round_, k] = to
        self._leased_at[round_, k] = now
        return Lease(round_, k, to, owner)

    def _not_begun(
        self, round_: int, count: int, table: Table, waiting: str, members: Mapping[str, Member]
    ) -> dict[str, list[int]]:
        """What other workers have of `round_` and have not begun, as far as is known."""
        out: dict[str, list[int]] = {}
        for name in {*table.workers, *members}:
            member = members.get(name)
            if name == waiting or (member is not None and member.hello.role != "worker"):
                continue
            gone = member is None or not member.active
            if member is not None and not gone and member.beat.round == round_:
                ks = member.beat.left
            elif gone or (member is not None and member.beat.round < round_):
                ks = list(table.run(name, count))
            else:
                continue
            out[name] = [k for k in ks if self.leased.get((round_, k), name) == name]
            if gone:  # what it was leased as an exception is open again as well
                out[name] += [k for (r, k), to in self.leased.items() if r == round_ and to == name and k not in out[name]]
        return out


def _computes(member: Member, round_: int) -> bool:
    """Whether `member` is at a micro-batch of `round_`, which is `member.beat.at`."""
    return member.active and member.beat.round == round_ and member.beat.at >= 0


def _may_begin(member: Member | None, now: float) -> int:
    """How many of a worker's micro-batches it may have begun without its word of it having come.

    It begins the next one about when it has been at this one for as long as one takes; word of that is soon here.
    """
    if member is None or not member.active or member.beat.seconds <= 0:
        return 0
    seconds, elapsed = member.beat.seconds, now - member.since
    if seconds < _NEWS_S:
        return math.ceil(_NEWS_S / seconds) if elapsed < 2 * _NEWS_S else 0
    return int(0.7 * seconds < elapsed < 1.5 * seconds + _NEWS_S)


def _is_late(member: Member, waiting: Member, now: float) -> bool:
    """Whether `member` has been at its micro-batch for so long that `waiting` had better do it too."""
    return now - member.since > _PATIENCE * max(waiting.beat.seconds, _NEWS_S / 2)
