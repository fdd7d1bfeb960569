"""When snapshots are taken, and when one is complete: the coordinator's part of them.

A state machine without a socket, a clock or a disk. A cut is a round that no server has reached yet, told to all of them ahead
of time, so that each takes hold of its state at that very border while training goes on; as every state between two rounds is
reached on every server, no messages need to be stopped or recorded (compare Chandy and Lamport, "Distributed snapshots", 1985).
Invariants: at most one cut is under way; one is complete only when every server has written its file for the same round.

A cut may take as long as it needs, as rounds and files can be of any size. It is given up when a server does not answer for some
time, or is at the round and gets no further with what it has to do for its file. Until it is there it waits for the training,
which has a deadline of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from roundtable.common.protocol.messages.saving import CheckpointStatus, TakeCheckpoint
from roundtable.common.protocol.transport import ASK_AGAIN_S

#: A cut is so many rounds ahead of the newest one known, and so many seconds at the speed of the last ones.
_LEAD_ROUNDS, _LEAD_S = 2, 0.5
#: How many times as far ahead the next try is where a server had passed the round already, at most.
_FURTHEST = 64
#: Seconds after which a cut is given up with which a server gets no further.
_PATIENCE_S = 120.0


@dataclass
class CheckpointInProgress:
    """The cut under way: what each server has said of it last and when that was something new, when all were asked, and since
    when none is before its round any more, if so."""

    round: int
    token: str
    began: float
    final: bool
    asked_at: float = float("-inf")
    reached_at: float | None = None
    said: dict[int, CheckpointStatus] = field(default_factory=dict)
    moved_at: dict[int, float] = field(default_factory=dict)


class CheckpointScheduler:
    """Decides on cuts every `every_s` seconds (0: never), and at the end of the run."""

    def __init__(self, every_s: float, now: float) -> None:
        self._every_s = every_s
        self._due_at = now + every_s
        self._stretch = 1
        #: Whether one is wanted as soon as may be, and whether one has been completed since.
        self._hurries = False
        self.is_made = False
        #: The cut under way, if any.
        self.under: CheckpointInProgress | None = None
        #: Round of the newest complete snapshot, and why the last try failed, '' if it did not.
        self.newest = -1
        self.failure = ""
        self._pace_from = now, 0
        self._pace = 0.0

    def due(self, versions: Mapping[int, int], planned: int, ended: bool, now: float) -> int | None:
        """The round to begin a cut for now. `versions` are the servers' newest, `planned` how many updates there will be as far
        as is known; with `ended` no worker is left, so that nothing moves any more."""
        if not self._every_s or self.under is not None or not versions:
            return None
        newest = max(versions.values())
        then, before = self._pace_from
        if now - then >= 1.0:
            self._pace, self._pace_from = (newest - before) / (now - then), (now, newest)
        if ended or (self._hurries and newest >= planned):
            final = min(versions.values())
            return final if newest == final != self.newest and not self.failure else None
        if now < self._due_at or newest >= planned:
            return None
        lead = 1 + round(_LEAD_S * self._pace) if self._hurries else _LEAD_ROUNDS + math.ceil(_LEAD_S * self._pace)
        return min(newest + self._stretch * lead, planned)

    def hurry(self, now: float) -> None:
        """Have a snapshot of the end of the round in progress, be that the one under way; `is_made` once it is there."""
        self._hurries, self.is_made, self._due_at, self.failure = True, False, now, ""

    def ended(self, round_: int) -> bool:
        """Whether nothing is to come any more once the run is over after `round_` rounds."""
        return self.under is None and (not self._every_s or self.newest == round_ or bool(self.failure))

    def begin(self, round_: int, token: str, now: float, final: bool = False) -> None:
        """A cut for `round_`, whose folder is there; `final`: no worker is left."""
        self.under, self.failure = CheckpointInProgress(round_, token, now, final), ""

    def ask(self, servers: Mapping[int, int], now: float) -> list[tuple[int, TakeCheckpoint]]:
        """What to tell which of `servers` (by version) now: those that have not written, again from time to time."""
        under = self.under
        if under is None or now < under.asked_at + ASK_AGAIN_S:
            return []
        under.asked_at = now
        if min(servers.values(), default=0) < under.round:
            under.reached_at = None
        elif under.reached_at is None:
            under.reached_at = now
        return [
            (server, TakeCheckpoint(under.round, under.token, under.reached_at is not None, under.final))
            for server in servers
            if server not in under.said or under.said[server].state in ("waits", "writing")
        ]

    def saved(self, server: int, saved: CheckpointStatus, now: float) -> None:
        """A server tells of the cut."""
        under = self.under
        if under is not None and saved.round == under.round:
            if saved.state == "waits" or under.said.get(server) != saved:
                under.moved_at[server] = now
            under.said[server] = saved

    def outcome(self, servers: Mapping[int, int], now: float) -> str:
        """'' while a cut goes on, 'complete' when all have written, else why it comes to nothing."""
        under = self.under
        if under is None:
            return ""
        states = {server: under.said[server].state if server in under.said else "" for server in servers}
        for server, state in states.items():
            if state == "failed":
                return under.said[server].reason
            if state == "missed":
                return f"server-{server} was past round {under.round} already."
        if all(state == "written" for state in states.values()):
            return "complete"
        late = [f"server-{server}" for server, state in states.items() if self._is_late(under, server, state, now)]
        if late:
            return f"{', '.join(late)} got no further with the snapshot of round {under.round} in {_PATIENCE_S:.0f} s."
        return ""

    def _is_late(self, under: CheckpointInProgress, server: int, state: str, now: float) -> bool:
        since = under.moved_at.get(server, under.began)
        if state == "writing":  # for which it may need that the others get there first
            since = max(since, now if under.reached_at is None else under.reached_at)
        return state != "written" and now > since + _PATIENCE_S

    def give_up(self) -> int:
        """The round of the cut under way, which will not come: another may be begun at once."""
        assert self.under is not None
        round_, self.under = self.under.round, None
        return round_

    def end(self, failure: str, now: float) -> None:
        """The cut is over: complete, or not for the reason `failure`."""
        assert self.under is not None
        missed = any(said.state == "missed" for said in self.under.said.values())
        if not failure:
            self.newest, self.is_made, self._hurries = self.under.round, True, False
        self._stretch = min(2 * self._stretch, _FURTHEST) if missed else 1
        self._due_at = now if missed else now + self._every_s
        self.failure = "" if missed else failure
        self.under = None
