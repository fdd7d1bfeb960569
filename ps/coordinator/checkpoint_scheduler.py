"""Decides when checkpoints are taken, and when one is complete.

`CheckpointScheduler` is a state machine without a socket, a clock or a disk. A checkpoint is of a round that no server has
reached. The coordinator names the round to all servers ahead of time. Each server captures its state at that round, while
training goes on. Every server passes through the state between two rounds, so no messages need be stopped or recorded (compare
Chandy and Lamport, "Distributed snapshots", 1985). Invariants: at most one checkpoint is in progress; it is complete only when
every server has written its file.

A checkpoint may take as long as it needs, because rounds and files can be of any size. The coordinator gives it up if a server
does not answer for some time, or has reached the round and makes no progress with its file. Before the round is reached, the
server waits for training, which has a deadline of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from roundtable.common.protocol.messages.saving import CheckpointStatus, TakeCheckpoint
from roundtable.common.protocol.transport import ASK_AGAIN_S

#: A checkpoint's round is this many rounds ahead of the newest known round,
_LEAD_ROUNDS = 2
#: plus the rounds of this many seconds at the last speed.
_LEAD_S = 0.5
#: If a server had passed the round, the next try is twice as far ahead, up to this factor.
_FURTHEST = 64
#: Seconds without progress of a server after which a checkpoint is given up.
_PATIENCE_S = 120.0


@dataclass
class CheckpointInProgress:
    """A checkpoint that servers write."""

    round: int
    token: str
    began: float
    #: True if no worker is left.
    final: bool
    #: When servers were last asked.
    asked_at: float = float("-inf")
    #: Since when all servers have reached the round, or None.
    reached_at: float | None = None
    #: By server: its last status.
    said: dict[int, CheckpointStatus] = field(default_factory=dict)
    #: By server: when its status last changed.
    moved_at: dict[int, float] = field(default_factory=dict)


class CheckpointScheduler:
    """Decides on checkpoints every `every_s` seconds (0: never), and at the end of the run."""

    def __init__(self, every_s: float, now: float) -> None:
        self._every_s = every_s
        self._due_at = now + every_s
        self._lead_factor = 1
        #: True if a checkpoint is wanted as soon as possible.
        self._hurries = False
        #: True if a checkpoint has been completed since `hurry`.
        self.is_made = False
        #: The checkpoint in progress, if any.
        self.in_progress: CheckpointInProgress | None = None
        #: The round of the newest complete checkpoint, or -1.
        self.newest = -1
        #: Why the last try failed, or ''.
        self.failure = ""
        #: The time and the round from which `_pace` is measured.
        self._pace_from = now, 0
        #: Rounds per second.
        self._pace = 0.0

    def due(self, versions: Mapping[int, int], planned: int, ended: bool, now: float) -> int | None:
        """Return the round for which to begin a checkpoint now, or None.

        `versions` has the servers' newest versions, and `planned` is the number of known updates. With `ended`, no worker is left
        and no version changes any more.
        """
        if not self._every_s or self.in_progress is not None or not versions:
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
        return min(newest + self._lead_factor * lead, planned)

    def hurry(self, now: float) -> None:
        """Ask for a checkpoint of the end of the round in progress. `is_made` says when it is complete."""
        self._hurries, self.is_made, self._due_at, self.failure = True, False, now, ""

    def has_ended(self, round_: int) -> bool:
        """Return whether a run that ended after `round_` rounds needs no further checkpoint."""
        return self.in_progress is None and (not self._every_s or self.newest == round_ or bool(self.failure))

    def begin(self, round_: int, token: str, now: float, final: bool = False) -> None:
        """Begin a checkpoint of `round_`, whose folder exists. With `final`, no worker is left."""
        self.in_progress, self.failure = CheckpointInProgress(round_, token, now, final), ""

    def ask(self, servers: Mapping[int, int], now: float) -> list[tuple[int, TakeCheckpoint]]:
        """Return (server, request) for each server that has not written its file, if it is time to ask again.

        `servers` has the version of each server.
        """
        in_progress = self.in_progress
        if in_progress is None or now < in_progress.asked_at + ASK_AGAIN_S:
            return []
        in_progress.asked_at = now
        if min(servers.values(), default=0) < in_progress.round:
            in_progress.reached_at = None
        elif in_progress.reached_at is None:
            in_progress.reached_at = now
        return [
            (server, TakeCheckpoint(in_progress.round, in_progress.token, in_progress.reached_at is not None, in_progress.final))
            for server in servers
            if server not in in_progress.said or in_progress.said[server].state in ("waits", "writing")
        ]

    def note_status(self, server: int, saved: CheckpointStatus, now: float) -> None:
        """Note a server's status of the checkpoint."""
        in_progress = self.in_progress
        if in_progress is not None and saved.round == in_progress.round:
            if saved.state == "waits" or in_progress.said.get(server) != saved:
                in_progress.moved_at[server] = now
            in_progress.said[server] = saved

    def outcome(self, servers: Mapping[int, int], now: float) -> str:
        """Return '' while the checkpoint goes on, 'complete' when all servers have written, else why it failed."""
        in_progress = self.in_progress
        if in_progress is None:
            return ""
        states = {server: in_progress.said[server].state if server in in_progress.said else "" for server in servers}
        for server, state in states.items():
            if state == "failed":
                return in_progress.said[server].reason
            if state == "missed":
                return f"server-{server} was past round {in_progress.round} already."
        if all(state == "written" for state in states.values()):
            return "complete"
        late = [f"server-{server}" for server, state in states.items() if self._is_late(in_progress, server, state, now)]
        if late:
            return f"{', '.join(late)} got no further with the checkpoint of round {in_progress.round} in {_PATIENCE_S:.0f} s."
        return ""

    def _is_late(self, in_progress: CheckpointInProgress, server: int, state: str, now: float) -> bool:
        since = in_progress.moved_at.get(server, in_progress.began)
        if state == "writing":  # its sharded layers may need the other servers to reach the round first
            since = max(since, now if in_progress.reached_at is None else in_progress.reached_at)
        return state != "written" and now > since + _PATIENCE_S

    def give_up(self) -> int:
        """Give up the checkpoint in progress and return its round. Another one may begin at once."""
        assert self.in_progress is not None
        round_, self.in_progress = self.in_progress.round, None
        return round_

    def end(self, failure: str, now: float) -> None:
        """End the checkpoint in progress. It is complete if `failure` is '', else it failed for that reason."""
        assert self.in_progress is not None
        missed = any(said.state == "missed" for said in self.in_progress.said.values())
        if not failure:
            self.newest, self.is_made, self._hurries = self.in_progress.round, True, False
        self._lead_factor = min(2 * self._lead_factor, _FURTHEST) if missed else 1
        self._due_at = now if missed else now + self._every_s
        self.failure = "" if missed else failure
        self.in_progress = None
