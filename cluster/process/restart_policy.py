"""How often a killed process is restarted, and when."""

from __future__ import annotations

from dataclasses import dataclass

#: The longest pause before a restart, in seconds.
_LONGEST_S = 30.0


@dataclass(frozen=True)
class RestartPolicy:
    """How often each killed process is restarted, and after which pauses."""

    #: Restarts per process.
    times: int = 3
    #: Seconds before the first restart. Each pause is twice the one before.
    backoff_s: float = 0.5

    def pause_s(self, before: int) -> float:
        """Return the seconds before the next restart of a process that was restarted `before` times."""
        return min(self.backoff_s * 2.0**before, _LONGEST_S)

    def plan(self, before: int, pause_s: float) -> str:
        """Return a phrase on the next restart."""
        return f"restarting in {pause_s:g} s (restart {before + 1} of {self.times})"
