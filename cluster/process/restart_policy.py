"""How often a process that was killed is started again, and when."""

from __future__ import annotations

from dataclasses import dataclass

#: The longest pause before a process is started again, seconds.
_LONGEST_S = 30.0


@dataclass(frozen=True)
class RestartPolicy:
    """How often each process that was killed is started again, and seconds before the first time; each pause doubles."""

    times: int = 3
    backoff_s: float = 0.5

    def pause_s(self, before: int) -> float:
        """Seconds to wait with one that was started again `before` times."""
        return min(self.backoff_s * 2.0**before, _LONGEST_S)

    def plan(self, before: int, pause_s: float) -> str:
        """What is to come, in words."""
        return f"restarting in {pause_s:g} s (restart {before + 1} of {self.times})"
