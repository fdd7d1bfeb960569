"""How long a member may be silent before it counts as lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from roundtable.common.config.settings import Settings
from roundtable.common.network.host_identity import Place
from roundtable.common.policies import Policy
from roundtable.common.protocol.messages.session import Hello
from roundtable.common.protocol.transport import HEARTBEAT_S, STOPPED_S
from roundtable.ps.coordinator.state.roster import Member, Roster

#: Seconds of silence after which a worker on the coordinator's host counts as lost, if others can do its work.
NEAR_S = 3.0
#: The same for all other members: a false alarm costs more.
FAR_S = 15.0
_LONGEST_S = 60.0
#: How often the time is doubled at most: more would be no number.
_MOST_DOUBLINGS = 10
#: Whether a process is dead is looked up only after so many seconds of silence.
_LOOKED_FOR_S = 2 * HEARTBEAT_S


class FailureDetector:
    """Decides from silence which members are lost."""

    def __init__(self, settings: Settings, policy: Policy, place: Place, now: float) -> None:
        """The coordinator is at `place`."""
        self._settings = settings
        self._policy = policy
        self._place = place
        self._looked_at = now
        #: How often each process has counted as lost.
        self._alarms: Counter[tuple[str, str, int]] = Counter()

    def note_pause(self, roster: Roster, now: float) -> None:
        """Do not count the time in which this process did not run: nobody listened."""
        if (paused_s := now - self._looked_at) > STOPPED_S:
            for member in roster.members.values():
                member.heard_at += paused_s
        self._looked_at = now

    def note_loss(self, member: Member) -> None:
        """Wait longer for the process the next time: it may be unable to help being silent."""
        self._alarms[_process(member)] += 1

    def silence_s(self, member: Member) -> float:
        """Return the seconds of silence after which `member` counts as lost.

        They double each time that the process counted as lost and turned out to be alive.
        """
        if self._settings.heartbeat_timeout is not None:
            return self._settings.heartbeat_timeout
        replaceable = member.hello.role == "worker" and not self._policy.is_local
        bound = NEAR_S if replaceable and member.hello.place.sees(self._place) else FAR_S
        return min(bound * 2.0 ** min(self._alarms[_process(member)], _MOST_DOUBLINGS), _LONGEST_S)

    def why_lost(self, member: Member, now: float, is_dead: Callable[[Hello], bool]) -> str:
        """Return why `member` counts as lost, or ''. `is_dead` says whether it is certain that a process has ended."""
        silent_s, who = now - member.heard_at, f"process {member.hello.pid} on {member.hello.host}"
        if silent_s > _LOOKED_FOR_S and is_dead(member.hello):
            return f"{who} exited"
        return f"{who} sent no heartbeat for {self.silence_s(member):g} s" if silent_s > self.silence_s(member) else ""


def _process(member: Member) -> tuple[str, str, int]:
    """Return what is the same of a process that joins again, and differs between processes that are there at once."""
    return member.hello.place.pids, member.hello.host, member.hello.pid
