"""Decides how long a member may be silent before it counts as lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from roundtable.common.config.settings import Settings
from roundtable.common.network.host_identity import Place
from roundtable.common.policies import Policy
from roundtable.common.protocol.messages.session import Hello
from roundtable.common.protocol.transport import HEARTBEAT_S, STOPPED_S
from roundtable.ps.coordinator.state.roster import Member, Roster

#: A worker on the coordinator's host counts as lost after this many seconds of silence, if others can do its work.
NEAR_S = 3.0
#: The same for all other members. It is longer, because a false alarm costs more.
FAR_S = 15.0
#: The longest time after doublings.
_LONGEST_S = 60.0
#: The time is doubled at most this often, so that it stays a finite number.
_MOST_DOUBLINGS = 10
#: After this many seconds of silence the coordinator checks whether the process is dead.
_LOOKED_FOR_S = 2 * HEARTBEAT_S


class FailureDetector:
    """Decides from silence which members are lost."""

    def __init__(self, settings: Settings, policy: Policy, place: Place, now: float) -> None:
        """`place` is the coordinator's."""
        self._settings = settings
        self._policy = policy
        self._place = place
        self._looked_at = now
        #: By process: how often it has counted as lost.
        self._alarms: Counter[tuple[str, str, int]] = Counter()

    def note_pause(self, roster: Roster, now: float) -> None:
        """Do not count silence while the coordinator's process was stopped, because it could not listen."""
        if (paused_s := now - self._looked_at) > STOPPED_S:
            for member in roster.members.values():
                member.heard_at += paused_s
        self._looked_at = now

    def note_loss(self, member: Member) -> None:
        """Double the time that this process may be silent the next time."""
        self._alarms[_process(member)] += 1

    def silence_s(self, member: Member) -> float:
        """Return the seconds of silence after which `member` counts as lost.

        The time doubles each time that the process counted as lost and turned out to be alive.
        """
        if self._settings.heartbeat_timeout is not None:
            return self._settings.heartbeat_timeout
        replaceable = member.hello.role == "worker" and not self._policy.is_local
        bound = NEAR_S if replaceable and member.hello.place.sees(self._place) else FAR_S
        return min(bound * 2.0 ** min(self._alarms[_process(member)], _MOST_DOUBLINGS), _LONGEST_S)

    def why_lost(self, member: Member, now: float, is_dead: Callable[[Hello], bool]) -> str:
        """Return why `member` counts as lost, or ''. `is_dead` returns True if a process has certainly ended."""
        silent_s, who = now - member.heard_at, f"process {member.hello.pid} on {member.hello.host}"
        if silent_s > _LOOKED_FOR_S and is_dead(member.hello):
            return f"{who} exited"
        return f"{who} sent no heartbeat for {self.silence_s(member):g} s" if silent_s > self.silence_s(member) else ""


def _process(member: Member) -> tuple[str, str, int]:
    """Return a key of the process that stays when it joins again, and that no other running process has."""
    return member.hello.place.pids, member.hello.host, member.hello.pid
